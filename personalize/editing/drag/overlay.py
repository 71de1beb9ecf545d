"""The picture that shows a drag: what moves, from where to where, and where it arrived."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw

from personalize.editing.drag.points import Point

_MASK, _HANDLE, _TARGET = (255, 214, 10), (230, 57, 70), (29, 120, 240)


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
