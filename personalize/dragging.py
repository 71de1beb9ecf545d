"""Pictures dragged by points, whatever their size.

Points are (x, y) in pixels of the picture as given, handle and target in turn: handle, target, handle, target, …
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor

from personalize.adapter import Adapter
from personalize.attachment import equipped
from personalize.drag import DEFAULTS, Drag, DragSettings, drag, move_length
from personalize.errors import UserError
from personalize.frames import Frame, Picture, Point, opened
from personalize.mixing import mixed
from personalize.model import Conditioning, StableDiffusion

_MASK, _HANDLE, _TARGET = (255, 214, 10), (230, 57, 70), (29, 120, 240)


@dataclass(frozen=True)
class Dragged:
    """A dragged picture; all pictures have the size of the one given.

    mask: white where cells moved.  overlay: the source with mask, handles (red), targets (blue) and where the handles
    were found (rings).  arrived: those places (x, y) in pixels, to the nearest latent cell.  missed: their distances
    from the targets, px.  seconds: of the whole; edit_seconds: of the warp alone.  notes: what the user should know.
    """

    image: Image.Image
    mask: Image.Image
    overlay: Image.Image
    arrived: tuple[Point, ...]
    missed: tuple[float, ...]
    seconds: float
    edit_seconds: float
    notes: tuple[str, ...]
    drag: Drag


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
) -> Dragged:
    """Drag what lies at each handle of `points` to its target.

    Args:
        points: handle and target in turn, (x, y) in pixels.
        mask: white where the picture may move; without it the handles' attention says so.
        prompt: what the picture shows; by default what the adapter learned, or nothing.
        resolution: pictures above its square in pixels are scaled down; by default the base's own.
        paste: put the source's own pixels where nothing was to change; the autoencoder blurs them otherwise.

    Raises:
        UserError: no points, a handle without target, points outside the picture, and what `personalize.drag` raises.
    """
    began = time.perf_counter()
    picture = opened(picture)
    handles, targets = pairs(points, picture.size)
    frame = Frame.of(model, picture, resolution)
    allowed = None if mask is None else frame.mask_to_cells(opened(mask))
    starts, ends = [frame.to_cells(point) for point in handles], [frame.to_cells(point) for point in targets]
    with equipped(model, adapter):
        told = conditioning(model, adapter, prompt, (frame.pixels.shape[-2], frame.pixels.shape[-1]))
        found = drag(model, model.encode(frame.pixels), told, starts, ends, settings, allowed, frame.visible)
    image = frame.to_picture(model.decode(found.latents))
    if paste:
        image = pasted(image, frame.picture, frame.mask_to_picture(found.region), frame.factor)
    arrived = tuple(frame.to_point(at) for at in places(found, starts))
    missed = tuple(math.dist(at, target) for at, target in zip(arrived, targets, strict=True))
    shown = frame.mask_to_picture(found.mask)
    sheet = overlay(frame.picture, shown, handles, targets, arrived)
    said = notes(frame, found, starts, ends, settings, allowed)
    return Dragged(
        image, shown, sheet, arrived, missed, time.perf_counter() - began, found.edit_seconds, said, found
    )  # fmt: skip


def pairs(points: Sequence[Point], size: tuple[int, int]) -> tuple[list[Point], list[Point]]:
    """Handles and targets of `points`, all of them within a picture of `size` (W, H).  UserError if they are not."""
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
    """`prompt`; or else the adapter's source embedding, or its caption; or else the empty prompt.

    Inside `equipped`, prompts are read with the adapter's change of the text encoders, and may say its tokens.
    """
    caption = "" if adapter is None else str(adapter.info.get("caption", ""))
    told = model.prompts([caption if prompt is None else prompt], size)
    learned = adapter.source if adapter is not None and prompt is None else None
    return mixed(model, learned, told, alpha=1.0, beta=0.0)


def places(found: Drag, handles: Sequence[Point]) -> list[Point]:
    """Where handles were found, (x, y) in latent cells: as far within their new cells as they were in the old ones."""
    return [(x % 1 + column, y % 1 + row) for (x, y), (row, column) in zip(handles, found.arrived, strict=True)]


def notes(
    frame: Frame, found: Drag, handles: Sequence[Point], targets: Sequence[Point], settings: DragSettings,
    mask: Tensor | None,
) -> tuple[str, ...]:  # fmt: skip
    """What may not be as the user expects: drags under one cell, thresholds that were changed, masks without handle."""
    said = []
    for number, (handle, target) in enumerate(zip(handles, targets, strict=True), 1):
        vector = [end - start for start, end in zip(handle, target, strict=True)]
        if any(vector) and move_length(vector) == 0:
            cell = frame.to_point((1, 1))[0]
            said.append(f"drag {number} is shorter than half a latent cell ({cell:.3g} px a cell): nothing moves by it")
        if mask is not None and not mask[int(handle[1]), int(handle[0])]:
            said.append(f"handle {number} lies outside the mask")
    for number, threshold in enumerate(found.thresholds, 1):
        if threshold != settings.mask_threshold:
            fault = "large" if threshold > settings.mask_threshold else "small"
            said.append(
                f"the mask of handle {number} was too {fault} at threshold {settings.mask_threshold:g}, so it is "
                f"{threshold:.3g}: the handle may lie on the background or an edge; look at the overlay or give a mask"
            )
    if not found.mask.any():
        said.append("the mask holds no cell")
    return tuple(said)


def pasted(image: Image.Image, source: Image.Image, region: Image.Image, blend: int) -> Image.Image:
    """`image` inside `region`, `source` outside it to the bit; inside, the border fades over about `blend` pixels."""
    soft = np.asarray(region.filter(ImageFilter.GaussianBlur(blend / 2)), np.int16)
    alpha = np.where(np.asarray(region) > 0, (2 * soft - 255).clip(0, 255), 0).astype(np.uint8)
    return Image.composite(image, source, Image.fromarray(alpha))


def overlay(
    picture: Image.Image,
    mask: Image.Image,
    handles: Sequence[Point],
    targets: Sequence[Point],
    arrived: Sequence[Point],
) -> Image.Image:
    """`picture` with `mask` in yellow, arrows from handles (red) to targets (blue), and rings where handles arrived."""
    tint = Image.composite(Image.new("RGB", picture.size, _MASK), picture, mask)
    sheet = Image.blend(picture, tint, 0.45)
    pen, dot = ImageDraw.Draw(sheet), max(2, max(picture.size) // 64)
    for handle, target, found in zip(handles, targets, arrived, strict=True):
        pen.line([handle, target], (255, 255, 255), max(1, dot // 2))
        for (x, y), colour in ((handle, _HANDLE), (target, _TARGET)):
            pen.ellipse((x - dot, y - dot, x + dot, y + dot), colour, (255, 255, 255))
        x, y = found
        pen.ellipse((x - 2 * dot, y - 2 * dot, x + 2 * dot, y + 2 * dot), None, (20, 20, 24), max(1, dot // 2))
    return sheet
