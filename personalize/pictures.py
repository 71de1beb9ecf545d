"""Pictures for people: labelled grids, and pictures marked with what was done to them."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from textwrap import wrap

from PIL import Image, ImageDraw, ImageFont

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
    """Lay pictures out in `rows`, fitted into square cells of `cell` pixels, None leaving a cell empty.

    Args:
        rows: pictures, row by row; rows may differ in length.
        columns: text above each column.
        labels: text left of each row.
        captions: text below each picture, row by row.
        title: text above everything.

    Raises:
        ValueError: if there is no picture, or a label too few.
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
    heads = [wrap(text, max(8, cell // 7)) for text in columns]
    below = [[_wrapped(text, max(8, cell // 7)) for text in row] for row in captions]
    tall = cell + _GAP + line * max((text.count("\n") + 1 for row in below for text in row), default=0)  # of a row
    left = cell // 2 + cell // 4 if any(labels) else 0
    top = (line + _GAP if title else 0) + max((len(head) for head in heads), default=0) * line + _GAP
    sheet = Image.new("RGB", (left + width * (cell + _GAP) + _GAP, top + len(rows) * tall), _PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((_GAP, _GAP // 2), title, _INK, font)
    for x, head in enumerate(heads):
        at = (left + _GAP + x * (cell + _GAP), top - len(head) * line - 2)
        pen.multiline_text(at, "\n".join(head), _INK, font)
    for y, row in enumerate(rows):
        if labels:
            text = "\n".join(wrap(labels[y], max(8, left // 7)))
            pen.multiline_text((_GAP, top + y * tall + cell // 3), text, _INK, font)
        for x, picture in enumerate(row):
            corner = (left + _GAP + x * (cell + _GAP), top + y * tall)
            if picture is not None:
                fitted = scaled_to_side(picture, cell)
                offset = ((cell - fitted.width) // 2, (cell - fitted.height) // 2)
                sheet.paste(fitted, (corner[0] + offset[0], corner[1] + offset[1]))
            if below:
                pen.multiline_text((corner[0], corner[1] + cell + 2), below[y][x], _INK, font)
    return sheet


def _wrapped(text: str, width: int) -> str:
    return "\n".join(part for line in text.splitlines() for part in wrap(line, width))


def scaled_to_side(picture: Image.Image, side: int) -> Image.Image:
    """`picture` in RGB, scaled so that its longer side is `side` pixels; small ones grow with sharp edges."""
    scale = side / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    how = Image.Resampling.NEAREST if scale >= 2 and scale == int(scale) else Image.Resampling.LANCZOS
    return picture.convert("RGB").resize(size, how)


def png(picture: Image.Image) -> bytes:
    """`picture` as the bytes of a PNG file; the same picture gives the same bytes."""
    buffer = BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()
