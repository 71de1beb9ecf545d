"""See a drag before it is drawn: what moves, where it goes and what must be filled, in pixels and without sampling."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from personalize.editing.drag.compose import WarpedPicture, warp_picture
from personalize.editing.drag.config import DEFAULTS, DragSettings
from personalize.editing.drag.detail import with_detail
from personalize.editing.drag.mask import dilated
from personalize.editing.drag.overlay import overlay
from personalize.editing.drag.points import handles_and_targets, middle
from personalize.editing.drag.reading import DragSource
from personalize.editing.drag.selection import MaskEdits
from personalize.io.mask_files import HALF_WHITE
from personalize.models.image_processor import PaddedImage, Picture, Point, as_mask_image


@dataclass(frozen=True)
class DragPreview:
    """The result of `preview_drag`; all its pictures have the size of the source.

    mask: white where something moves.  warped: the dragged picture, smooth where it must be filled.  void: white where
    it must be filled.  overlay: the source with the mask, handles, targets and places of arrival.
    share: what moves, as a share of the picture.  arrived: where the warp takes each handle, (x, y) in pixels.
    seconds: time from the given source to this preview.
    drag: the same on the padded picture.
    """

    mask: Image.Image
    warped: Image.Image
    void: Image.Image
    overlay: Image.Image
    share: float
    arrived: tuple[Point, ...]
    seconds: float
    drag: WarpedPicture


def preview_drag(
    source: DragSource, points: Sequence[object], settings: DragSettings = DEFAULTS, *, mask: Picture | None = None,
    add: Sequence[Point] = (), remove: Sequence[Point] = (),
) -> DragPreview:  # fmt: skip
    """Show what a drag will do; the arguments are those of `drag_picture`.  No prediction is made."""
    began = time.perf_counter()
    frame = source.frame
    handles, targets = handles_and_targets(points, frame.picture.size, regions=settings.mode == "region")
    given = None if mask is None else _mask_to_pixels(frame, as_mask_image(mask))
    edits = MaskEdits(given, tuple(map(frame.to_scaled, add)), tuple(map(frame.to_scaled, remove)))
    shapes = [tuple(map(frame.to_scaled, shape)) for shape in (*handles, *targets)]
    drag = warp_picture(source, shapes[: len(handles)], shapes[len(handles) :], _scaled(frame, settings), edits)
    moved, arrived = to_mask_picture(frame, drag.mask), tuple(map(frame.from_scaled, drag.arrived))
    marked = overlay(frame.picture, moved, [middle(one) for one in handles], [middle(one) for one in targets], arrived)
    height, width = frame.size
    return DragPreview(
        moved, composed(frame, drag.pixels, drag), to_mask_picture(frame, drag.void), marked,
        float(drag.mask.sum()) / (height * width), arrived, time.perf_counter() - began, drag,
    )  # fmt: skip


def composed(frame: PaddedImage, pixels: Tensor, drag: WarpedPicture) -> Image.Image:
    """`pixels` (3, H, W) where something has changed, in the source's size; elsewhere the source's own pixels.

    In a source that is larger, what has changed fades in over about a pixel of the frame, so that its border is smooth.
    """
    if not drag.layers:
        return frame.picture
    picture, changed = frame.to_picture(pixels[None]), drag.mask | drag.covered | drag.void
    if frame.size == (frame.picture.height, frame.picture.width):
        return Image.composite(picture, frame.picture, to_mask_picture(frame, changed))
    height, width = frame.size
    grown = Image.fromarray(dilated(changed, 1)[:height, :width].numpy().astype(np.uint8) * 255)
    soft = grown.resize(frame.picture.size, Image.Resampling.BILINEAR)
    return Image.composite(with_detail(frame, picture, drag.layers), frame.picture, soft)


def to_mask_picture(frame: PaddedImage, mask: Tensor) -> Image.Image:
    """A mask (H, W) of the padded picture as a picture of the source's size, white = True."""
    height, width = frame.size
    image = Image.fromarray(mask[:height, :width].numpy().astype(np.uint8) * 255)
    return image if image.size == frame.picture.size else image.resize(frame.picture.size, Image.Resampling.NEAREST)


def _mask_to_pixels(frame: PaddedImage, mask: Image.Image) -> Tensor:
    """A user's mask picture, white = may move → boolean (H, W).  UserError if it has another size than the picture."""
    frame.check_mask_size(mask)
    height, width = frame.size
    grey = np.asarray(mask.convert("L").resize((width, height), Image.Resampling.BOX))
    full = torch.zeros(frame.pixels.shape[-2:], dtype=torch.bool)
    full[:height, :width] = torch.from_numpy(grey >= HALF_WHITE)
    return full


def _scaled(frame: PaddedImage, settings: DragSettings) -> DragSettings:
    """`settings` with `grow` in pixels of the padded picture."""
    return replace(settings, grow=round(settings.grow * frame.size[0] / frame.picture.height))
