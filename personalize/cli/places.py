"""Points, boxes and polygons as they are written on a command line.  This module imports no torch."""

from __future__ import annotations

import math
import os
import re
from typing import Any

from personalize.errors import UserError

NUMBERS = re.compile(r"[-+.\d]+%?(?:[\s,;:]+[-+.\d]+%?)+")  # what may have been meant as a box


def box(text: str) -> tuple[float, float, float, float] | None:
    """ "10,20,100,80" → (10.0, 20.0, 100.0, 80.0); None if `text` is no list of four numbers."""
    try:
        left, top, right, bottom = (float(part) for part in text.split(","))
    except ValueError:
        return None
    return (left, top, right, bottom) if all(map(math.isfinite, (left, top, right, bottom))) else None


def check_place(text: str, size: tuple[int, int]) -> None:
    """UserError unless `text` is a box in a picture of `size` (width, height), or the file of a picture as large."""
    from personalize.io.image_files import image_size
    from personalize.io.mask_files import check_box, check_mask_size
    from personalize.io.plain_files import at_home

    if (place := box(text)) is not None:
        check_box(place, size)
        return
    if NUMBERS.fullmatch(text) and not os.path.lexists(text):
        raise UserError(f"{text[:80]!r} is no box left,top,right,bottom in pixels, such as 120,80,400,360, and no file")
    check_mask_size(image_size(at_home(text)), size)


def interleaved_points(handles: tuple[str, ...], targets: tuple[str, ...]) -> list[Any]:
    """The points of --from and --to in the order handle, target, ….  UserError if their counts differ."""
    if len(handles) != len(targets):
        raise UserError(f"{len(handles)} of --from and {len(targets)} of --to: each --from needs a --to")
    return [parse_shape(text) for pair in zip(handles, targets, strict=True) for text in pair]


def parse_shape(text: str) -> tuple[Any, ...]:
    """ "120,64.5" → (120.0, 64.5); four numbers are a box, six and more the corners of a polygon."""
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not all(map(math.isfinite, numbers)):
        raise UserError(f"a point is x,y in pixels, for example 120,64; got {text!r}, which is no place")
    if len(numbers) in (2, 4):
        return tuple(numbers)
    if len(numbers) < 6 or len(numbers) % 2:
        raise UserError(
            f"a point is x,y in pixels, for example 120,64; got {text!r} (a box has 4 numbers, a polygon 6 or more)"
        )
    return tuple(zip(numbers[::2], numbers[1::2], strict=True))


def point_of(text: str) -> tuple[float, float]:
    """ "120,64.5" → (120.0, 64.5)."""
    numbers = parse_shape(text)
    if len(numbers) != 2:
        raise UserError(f"a point is x,y in pixels, for example 120,64; got {text!r}")
    return numbers[0], numbers[1]
