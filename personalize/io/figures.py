"""Figures: pictures laid out in a labelled grid, and pictures as PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import wrap
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import Tensor

from personalize.io.provenance import Provenance, picture_bytes

_GAP = 6
_INK, _PAPER = (32, 32, 36), (255, 255, 255)


def grid(
    rows: Sequence[Sequence[Image.Image | None]],
    *,
    columns: Sequence[str] = (),
    labels: Sequence[str] = (),
    captions: Sequence[Sequence[str]] = (),
    title: str = "",
    cell: int = 192,
) -> Image.Image:
    """Lay pictures out in a grid of square cells, each picture scaled to fit into its cell.

    Args:
        rows: pictures, row by row; None leaves a cell empty; rows may differ in length.
        columns: text above each column.
        labels: text left of each row.
        captions: text below each picture, row by row.
        title: text above everything.
        cell: side of a cell in px.

    Raises:
        ValueError: no picture, or a number of labels or captions that differs from that of rows or pictures.
    """
    width = max((len(row) for row in rows), default=0)
    if width == 0:
        raise ValueError("a grid needs at least one picture, got none")
    if labels and len(labels) != len(rows):
        raise ValueError(f"a grid of {len(rows)} rows needs as many labels, got {len(labels)}")
    if captions and [len(row) for row in captions] != [len(row) for row in rows]:
        raise ValueError("a grid needs a caption for every picture, or none")
    height = max(11, cell // 13)
    font, line = ImageFont.load_default(height), height + 4
    headings = [_fitting(text, font, cell, max(8, cell // 7)).splitlines() for text in columns]
    below = [[_fitting(text, font, cell, max(8, cell // 7)) for text in row] for row in captions]
    row_height = cell + _GAP + line * max((text.count("\n") + 1 for row in below for text in row), default=0)
    left = cell // 2 + cell // 4 if any(labels) else 0
    across = left + width * (cell + _GAP) + _GAP
    title = _fitting(title, font, across - 2 * _GAP)
    above = (title.count("\n") + 1) * line + _GAP if title else 0
    top = above + max((len(heading) for heading in headings), default=0) * line + _GAP
    sheet = Image.new("RGB", (across, top + len(rows) * row_height), _PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.multiline_text((_GAP, _GAP // 2), title, _INK, font)
    for x, heading in enumerate(headings):
        corner = (left + _GAP + x * (cell + _GAP), top - len(heading) * line - 2)
        pen.multiline_text(corner, "\n".join(heading), _INK, font)
    for y, row in enumerate(rows):
        if labels:
            text = _fitting(labels[y], font, left - _GAP, max(8, left // 7))
            start = min(cell // 3, max(0, row_height - (text.count("\n") + 1) * line))
            pen.multiline_text((_GAP, top + y * row_height + start), text, _INK, font)
        for x, picture in enumerate(row):
            corner = (left + _GAP + x * (cell + _GAP), top + y * row_height)
            if picture is not None:
                fitted = scaled_to_side(picture, cell)
                offset = ((cell - fitted.width) // 2, (cell - fitted.height) // 2)
                sheet.paste(fitted, (corner[0] + offset[0], corner[1] + offset[1]))
            if below:
                pen.multiline_text((corner[0], corner[1] + cell + 2), below[y][x], _INK, font)
    return sheet


def _fitting(text: str, font: Any, width: int, most: int = 10**4) -> str:
    """`text` in as many lines as it needs: none has over `most` characters, or more than `width` px in this font."""
    texts = (_wrapped(text, length) for length in range(min(most, round(width / font.getlength("i"))), 0, -1))
    return next((one for one in texts if max(map(font.getlength, one.split("\n"))) <= width), text)


def _wrapped(text: str, width: int) -> str:
    """`text` broken into lines of at most `width` characters, its own line breaks kept."""
    return "\n".join(part for line in text.splitlines() for part in wrap(line, width))


def scaled_to_side(picture: Image.Image, side: int) -> Image.Image:
    """`picture` in RGB, scaled so that its longer side is `side` px; whole multiples keep the pixels' edges sharp."""
    scale = side / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    resampling = Image.Resampling.NEAREST if scale >= 2 and scale == int(scale) else Image.Resampling.LANCZOS
    return picture.convert("RGB").resize(size, resampling)


def png(picture: Image.Image, mark: Provenance | None = None) -> bytes:
    """The bytes of `picture` as a PNG file with the marks of `mark`; equal arguments give equal bytes."""
    return picture_bytes(picture, mark)


def overlay(image: Image.Image, attention: Tensor) -> Image.Image:
    """`image` in grey with the map (h, w), of values in [0, 1], drawn over it in orange."""
    heat = (attention * 255).round().to(torch.uint8).numpy()
    alpha = np.asarray(Image.fromarray(heat).resize(image.size, Image.Resampling.BICUBIC), np.float32)[..., None] / 255
    grey = np.asarray(image.convert("L").convert("RGB"), np.float32) * 0.5
    glow = np.array([255, 140, 0], np.float32) * alpha + grey * (1 - 0.8 * alpha)
    return Image.fromarray(glow.clip(0, 255).astype(np.uint8))


def pasted(image: Image.Image, source: Image.Image, region: Image.Image, blend: int) -> Image.Image:
    """`image` inside the white `region`, exactly `source` outside; inside, the border is soft over about `blend` px."""
    soft = np.asarray(region.filter(ImageFilter.GaussianBlur(blend / 2)), np.int16)
    alpha = np.where(np.asarray(region) > 0, (2 * soft - 255).clip(0, 255), 0).astype(np.uint8)
    return Image.composite(image, source, Image.fromarray(alpha))
