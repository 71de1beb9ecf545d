"""Dragging points of pictures of any size, by warping pixels or latents.

Points are (x, y) in pixels of the picture as given, in the order handle, target, handle, target, ….
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d

from personalize.adapters.adapter import Adapter
from personalize.adapters.apply import applied
from personalize.editing.drag.config import DEFAULTS, DragSettings
from personalize.editing.drag.drag import LatentDrag, drag, rounded_length
from personalize.editing.drag.inpaint import fill_void
from personalize.editing.drag.mask import dilated
from personalize.editing.drag.overlay import overlay
from personalize.editing.drag.points import Shape, check_inside, handles_and_targets, middle
from personalize.editing.drag.preview import DragPreview, composed, preview_drag
from personalize.editing.drag.reading import DragSource, SourceCache, conditioning
from personalize.errors import UserError
from personalize.io.figures import pasted
from personalize.models.image_processor import PaddedImage, Picture, Point, as_image, as_mask_image
from personalize.models.stable_diffusion import StableDiffusion


@dataclass(frozen=True)
class DragResult:
    """The result of `drag_picture`; all its pictures have the size of the source.

    mask: white where something was moved.
    overlay: the source with the mask, the handles (red), the targets (blue) and the places where they arrived (rings).
    arrived: where each handle is in the result, (x, y) in pixels: by the warp, or with the method `latents` as found in
        the sampled picture, to the nearest latent cell.
    missed: distance of each from its target, in pixels.
    seconds: duration of everything; edit_seconds: of the mask and the warp alone.
    notes: sentences about what the user may not expect.
    preview: the drag before its void was filled; None with the method `latents`.
    drag: the drag on the latent grid; None with the method `pixels`.
    """

    image: Image.Image
    mask: Image.Image
    overlay: Image.Image
    arrived: tuple[Point, ...]
    missed: tuple[float, ...]
    seconds: float
    edit_seconds: float
    notes: tuple[str, ...]
    preview: DragPreview | None = None
    drag: LatentDrag | None = None

    @property
    def thresholds(self) -> tuple[float, ...]:
        """τ of each handle's automatic mask; empty if the user's mask was used alone."""
        if self.drag is not None:
            return self.drag.thresholds
        return () if self.preview is None else tuple(found.threshold for found in self.preview.drag.objects)


def drag_picture(
    model: StableDiffusion, picture: Picture, points: Sequence[Any], *, mask: Picture | None = None,
    prompt: str | None = None, adapter: Adapter | None = None, settings: DragSettings = DEFAULTS,
    resolution: int | None = None, paste: bool = False, add: Sequence[Point] = (), remove: Sequence[Point] = (),
    sources: SourceCache | None = None,
) -> DragResult:  # fmt: skip
    """Move what is at each handle of `points` to its target.

    Args:
        points: handles and targets alternating, (x, y) in pixels; in the mode `region` also boxes (left, top, right,
            bottom) and polygons ((x, y), (x, y), (x, y), …).
        mask: white where things may move; by default it is computed from the attention of the handles.
        prompt: what the picture shows; by default the adapter's learned source embedding or caption, or nothing.
        resolution: larger pictures are scaled down to about resolution² pixels; by default the base model's own.
        paste: with the method `latents`: copy the source's pixels to where nothing was to change, which the autoencoder
            would blur. The method `pixels` always does.
        add, remove: points on further parts of the object, and on things that do not belong to it.
        sources: keeps the prepared picture for the next drag of it.

    Raises:
        UserError: there are no points, a handle has no target, a point is outside the picture; a handle lies on the
            background, the mask is empty or covers everything; or see `drag`.
    """
    began = time.perf_counter()
    if settings.method == "latents":
        if add or remove:
            raise UserError("points to add to the mask or remove from it need the method pixels")
        if model.inpainting:
            raise UserError(
                "the method latents inverts pictures, which inpainting models cannot: use the method pixels"
            )
        return _drag_latents(
            model, as_image(picture), points, mask, prompt, adapter, settings, resolution, paste, began
        )
    source = _source(model, picture, points, (*add, *remove), prompt, adapter, settings, resolution, sources)
    preview = preview_drag(source, points, settings, mask=mask, add=add, remove=remove)
    drawn = preview.warped
    if bool(preview.drag.void.any()):
        with applied(model, adapter, any_base=model.inpainting):
            drawn = _filled(model, source, preview, settings)
    handles, targets = handles_and_targets(points, drawn.size, regions=settings.mode == "region")
    missed = tuple(math.dist(at, middle(shape)) for at, shape in zip(preview.arrived, targets, strict=True))
    return DragResult(
        drawn, preview.mask, preview.overlay, preview.arrived, missed, time.perf_counter() - began, preview.seconds,
        preview_notes(source, preview, () if settings.mode == "region" else handles), preview,
    )  # fmt: skip


def preview_picture(
    model: StableDiffusion, picture: Picture, points: Sequence[Any], *, mask: Picture | None = None,
    prompt: str | None = None, adapter: Adapter | None = None, settings: DragSettings = DEFAULTS,
    resolution: int | None = None, add: Sequence[Point] = (), remove: Sequence[Point] = (),
    sources: SourceCache | None = None,
) -> DragPreview:  # fmt: skip
    """What `drag_picture` with the same arguments would move and fill, without sampling."""
    if settings.method == "latents":
        raise UserError("a drag of latents has no preview: leave the method at pixels")
    source = _source(model, picture, points, (*add, *remove), prompt, adapter, settings, resolution, sources)
    return preview_drag(source, points, settings, mask=mask, add=add, remove=remove)


def _source(
    model: StableDiffusion, picture: Picture, points: Sequence[Any], more: Sequence[Point], prompt: str | None,
    adapter: Adapter | None, settings: DragSettings, resolution: int | None, sources: SourceCache | None,
) -> DragSource:  # fmt: skip
    """The prepared picture; the points are checked before anything is computed."""
    image = as_image(picture)
    handles_and_targets(points, image.size, regions=settings.mode == "region")
    for point in more:
        check_inside((point,), "point of the mask", image.size)
    return (sources or SourceCache()).get(model, image, prompt, adapter, resolution, settings)


def _filled(model: StableDiffusion, source: DragSource, preview: DragPreview, settings: DragSettings) -> Image.Image:
    """The previewed picture with its void filled by sampling; the border of the void is blended over a few pixels."""
    drag = preview.drag
    reach = round(settings.clearance * source.frame.factor)
    objects = dilated(drag.mask, reach) | drag.covered | drag.others
    filled = fill_void(model, drag.pixels, drag.void, objects, source.attention, settings)
    weight = soft_mask(drag.void, drag.covered, max(1, reach // 2))
    return composed(source.frame, drag.pixels * (1 - weight) + filled * weight, drag)


def soft_mask(void: Tensor, covered: Tensor, reach: int) -> Tensor:
    """The weight (H, W) in [0, 1] of the filling: 0 outside `void`, rising to 1 over `reach` pixels from its border.

    Towards `covered`, the object's new place, it does not fade: there the smooth filling must not show.
    """
    inside = (void | covered)[None, None].float()
    side = 2 * reach + 1
    share = avg_pool2d(inside, side, 1, reach, count_include_pad=False)[0, 0]
    return (2 * share - 1).clamp(0, 1) * void


def outside_notes(mask: Image.Image, handles: Sequence[Shape]) -> list[str]:
    """A sentence for each handle that is a point whose pixel is black in `mask`, a picture of what moves."""
    at = {number: shape[0] for number, shape in enumerate(handles, 1) if len(shape) == 1}
    return [f"handle {n} lies outside the mask" for n, (x, y) in at.items() if not mask.getpixel((int(x), int(y)))]


def preview_notes(source: DragSource, preview: DragPreview, handles: Sequence[Shape]) -> tuple[str, ...]:
    """What the user may not expect of a drag in pixels."""
    sentences, drag = outside_notes(preview.mask, handles), preview.drag
    for number, found in enumerate(drag.objects, 1):
        if int(found.cells.sum()) < 4:
            sentences.append(f"the object under handle {number} is only {int(found.cells.sum())} latent cells large")
    if not bool(drag.void.any()):
        sentences.append("nothing is uncovered, so nothing was sampled")
    height, width = source.frame.size
    if bool(drag.void.any()) and (width, height) != (full := source.frame.picture.size):
        sentences.append(f"what it uncovers is drawn at {width}×{height} px and scaled to {full[0]}×{full[1]}")
    area = min((layer.scale**2 for layer in drag.layers), default=1.0) * int(drag.mask.sum())
    # by opacity: a thing of one pixel that arrives between pixels covers none of them by half
    if drag.layers and sum(float(one.weight[:height, :width].sum()) for one in drag.layers) < 0.5 * area:
        sentences.append("more than half of what moves leaves the picture")
    return tuple(sentences)


def _drag_latents(
    model: StableDiffusion, picture: Image.Image, points: Sequence[Any], mask: Picture | None, prompt: str | None,
    adapter: Adapter | None, settings: DragSettings, resolution: int | None, paste: bool, began: float,
) -> DragResult:  # fmt: skip
    """`drag_picture` with the method `latents`."""
    shapes, goals = handles_and_targets(points, picture.size)
    handles, targets = [shape[0] for shape in shapes], [shape[0] for shape in goals]
    frame = PaddedImage.of(model, picture, resolution)
    allowed = None if mask is None else frame.mask_to_cells(as_mask_image(mask))
    starts, ends = [frame.to_cells(point) for point in handles], [frame.to_cells(point) for point in targets]
    with applied(model, adapter):
        prompted = conditioning(model, adapter, prompt, (frame.pixels.shape[-2], frame.pixels.shape[-1]))
        result = drag(model, model.encode(frame.pixels), prompted, starts, ends, settings, allowed, frame.visible)
    image = frame.to_picture(model.decode(result.latents))
    if paste:
        image = pasted(image, frame.picture, frame.mask_to_picture(result.region), frame.factor)
    arrived = tuple(frame.to_point(at) for at in arrival_points(result, starts))
    missed = tuple(math.dist(at, target) for at, target in zip(arrived, targets, strict=True))
    moved = frame.mask_to_picture(result.mask)
    marked = overlay(frame.picture, moved, handles, targets, arrived)
    outside = [] if mask is None else outside_notes(moved, shapes)
    sentences = (*outside, *notes(frame, result, starts, ends, settings))
    seconds = time.perf_counter() - began
    return DragResult(image, moved, marked, arrived, missed, seconds, result.edit_seconds, sentences, None, result)


def arrival_points(result: LatentDrag, handles: Sequence[Point]) -> list[Point]:
    """Where the handles arrived, (x, y) in latent cells, each with the offset inside its cell that it had before."""
    return [(x % 1 + column, y % 1 + row) for (x, y), (row, column) in zip(handles, result.arrived, strict=True)]


def notes(
    frame: PaddedImage, result: LatentDrag, handles: Sequence[Point], targets: Sequence[Point], settings: DragSettings
) -> tuple[str, ...]:  # fmt: skip
    """What the user may not expect of a drag on the latent grid: drags shorter than a cell, changed thresholds."""
    sentences = []
    for number, (handle, target) in enumerate(zip(handles, targets, strict=True), 1):
        vector = [end - start for start, end in zip(handle, target, strict=True)]
        if any(vector) and rounded_length(vector) == 0:
            cell = frame.to_point((1, 1))[0]
            size = f"(a cell is {cell:.3g} px)"
            sentences.append(f"drag {number} is shorter than half a latent cell {size}: it moves nothing")
    for number, threshold in enumerate(result.thresholds, 1):
        if threshold != settings.mask_threshold:
            fault = "large" if threshold > settings.mask_threshold else "small"
            sentences.append(
                f"the mask of handle {number} was too {fault} at threshold {settings.mask_threshold:g}, so it is "
                f"{threshold:.3g}: the handle may lie on the background or an edge; look at the overlay or give a mask"
            )
    if not result.mask.any():
        sentences.append("the mask contains no cell")
    return tuple(sentences)
