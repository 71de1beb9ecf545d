"""Drag points of pictures of any size: from pixels to latent cells, through `editing.drag.drag`, and back.

Points are (x, y) in pixels of the picture as given, in the order handle, target, handle, target, ….
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from personalize.adapters.adapter import Adapter
from personalize.adapters.apply import applied
from personalize.editing.drag.drag import DEFAULTS, DragSettings, LatentDrag, drag, rounded_length
from personalize.editing.vector_projection import edit_conditioning
from personalize.errors import UserError
from personalize.io.figures import pasted
from personalize.models.image_processor import PaddedImage, Picture, Point, as_image
from personalize.models.stable_diffusion import Conditioning, StableDiffusion

_MASK, _HANDLE, _TARGET = (255, 214, 10), (230, 57, 70), (29, 120, 240)


@dataclass(frozen=True)
class DragResult:
    """The result of `drag_picture`; all its pictures have the size of the source.

    mask: white where cells were moved.
    overlay: the source with the mask, the handles (red), the targets (blue) and the places where they arrived (rings).
    arrived: where each handle was found in the result, (x, y) in pixels, to the nearest latent cell.
    missed: distance of each from its target, in pixels.
    seconds: duration of everything; edit_seconds: of the warp alone.
    notes: sentences about what the user may not expect.
    drag: the same drag on the latent grid.
    """

    image: Image.Image
    mask: Image.Image
    overlay: Image.Image
    arrived: tuple[Point, ...]
    missed: tuple[float, ...]
    seconds: float
    edit_seconds: float
    notes: tuple[str, ...]
    drag: LatentDrag


def drag_picture(
    model: StableDiffusion,
    picture: Picture,
    points: Sequence[Point],
    *,
    mask: Picture | None = None,
    prompt: str | None = None,
    adapter: Adapter | None = None,
    settings: DragSettings = DEFAULTS,
    resolution: int | None = None,
    paste: bool = False,
) -> DragResult:
    """Move what is at each handle of `points` to its target.

    Args:
        points: handles and targets alternating, (x, y) in pixels.
        mask: white where things may move; by default it is computed from the attention of the handles.
        prompt: what the picture shows; by default the adapter's learned source embedding or caption, or nothing.
        resolution: larger pictures are scaled down to about resolution² pixels; by default the base model's own.
        paste: copy the source's pixels to where nothing was to change, which the autoencoder would blur.

    Raises:
        UserError: there are no points, a handle has no target, a point is outside the picture; or see `drag`.
    """
    began = time.perf_counter()
    picture = as_image(picture)
    handles, targets = handles_and_targets(points, picture.size)
    frame = PaddedImage.of(model, picture, resolution)
    allowed = None if mask is None else frame.mask_to_cells(as_image(mask))
    starts, ends = [frame.to_cells(point) for point in handles], [frame.to_cells(point) for point in targets]
    with applied(model, adapter):
        source = conditioning(model, adapter, prompt, (frame.pixels.shape[-2], frame.pixels.shape[-1]))
        result = drag(model, model.encode(frame.pixels), source, starts, ends, settings, allowed, frame.visible)
    image = frame.to_picture(model.decode(result.latents))
    if paste:
        image = pasted(image, frame.picture, frame.mask_to_picture(result.region), frame.factor)
    arrived = tuple(frame.to_point(at) for at in arrival_points(result, starts))
    missed = tuple(math.dist(at, target) for at, target in zip(arrived, targets, strict=True))
    moved = frame.mask_to_picture(result.mask)
    marked = overlay(frame.picture, moved, handles, targets, arrived)
    sentences = notes(frame, result, starts, ends, settings, allowed)
    seconds = time.perf_counter() - began
    return DragResult(image, moved, marked, arrived, missed, seconds, result.edit_seconds, sentences, result)


def handles_and_targets(points: Sequence[Point], size: tuple[int, int]) -> tuple[list[Point], list[Point]]:
    """The handles and the targets of `points`.  UserError unless all are within a picture of `size` (W, H)."""
    if not len(points):
        raise UserError("there are no points: give a handle and a target, each as x,y in pixels")
    if len(points) % 2:
        raise UserError(f"{len(points)} points: every handle needs a target, so give an even number")
    width, height = size
    for index, (x, y) in enumerate(points):
        if not (0 <= x < width and 0 <= y < height):
            raise UserError(
                f"{('handle', 'target')[index % 2]} {x:g},{y:g} is outside the picture: it is {width}×{height} px, "
                f"so x is 0 to {width - 1} and y 0 to {height - 1}"
            )
    return list(points[::2]), list(points[1::2])


@torch.no_grad()
def conditioning(
    model: StableDiffusion, adapter: Adapter | None, prompt: str | None, size: tuple[int, int]
) -> Conditioning:
    """The conditioning of a drag: of `prompt`, else the adapter's source embedding or caption, else the empty prompt.

    Call it inside `applied(model, adapter)`, so that the text encoders have the adapter's LoRA and learned tokens.
    """
    caption = "" if adapter is None else str(adapter.info.get("caption", ""))
    prompted = model.prompts([caption if prompt is None else prompt], size)
    learned = adapter.source if adapter is not None and prompt is None else None
    return edit_conditioning(model, learned, prompted, alpha=1.0, beta=0.0)


def arrival_points(result: LatentDrag, handles: Sequence[Point]) -> list[Point]:
    """Where the handles arrived, (x, y) in latent cells, each with the offset inside its cell that it had before."""
    return [(x % 1 + column, y % 1 + row) for (x, y), (row, column) in zip(handles, result.arrived, strict=True)]


def notes(
    frame: PaddedImage, result: LatentDrag, handles: Sequence[Point], targets: Sequence[Point], settings: DragSettings,
    mask: Tensor | None,
) -> tuple[str, ...]:  # fmt: skip
    """What the user may not expect: drags shorter than a cell, changed thresholds, handles outside the mask."""
    sentences = []
    for number, (handle, target) in enumerate(zip(handles, targets, strict=True), 1):
        vector = [end - start for start, end in zip(handle, target, strict=True)]
        if any(vector) and rounded_length(vector) == 0:
            cell = frame.to_point((1, 1))[0]
            size = f"(a cell is {cell:.3g} px)"
            sentences.append(f"drag {number} is shorter than half a latent cell {size}: it moves nothing")
        if mask is not None and not mask[int(handle[1]), int(handle[0])]:
            sentences.append(f"handle {number} lies outside the mask")
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


def overlay(
    picture: Image.Image,
    mask: Image.Image,
    handles: Sequence[Point],
    targets: Sequence[Point],
    arrived: Sequence[Point],
) -> Image.Image:
    """`picture` with `mask` in yellow, lines from handles (red) to targets (blue), and rings where handles arrived."""
    tint = Image.composite(Image.new("RGB", picture.size, _MASK), picture, mask)
    marked = Image.blend(picture, tint, 0.45)
    pen, dot = ImageDraw.Draw(marked), max(2, max(picture.size) // 64)
    for handle, target, arrival in zip(handles, targets, arrived, strict=True):
        pen.line([handle, target], (255, 255, 255), max(1, dot // 2))
        for (x, y), colour in ((handle, _HANDLE), (target, _TARGET)):
            pen.ellipse((x - dot, y - dot, x + dot, y + dot), colour, (255, 255, 255))
        x, y = arrival
        pen.ellipse((x - 2 * dot, y - 2 * dot, x + 2 * dot, y + 2 * dot), None, (20, 20, 24), max(1, dot // 2))
    return marked
