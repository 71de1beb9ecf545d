"""Points, boxes and polygons of a drag, checked against the picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from personalize.errors import UserError

Point = tuple[float, float]  # x, y
Shape = tuple[Point, ...]


def handles_and_targets(
    points: Sequence[Any], size: tuple[int, int], *, regions: bool = False
) -> tuple[list[Shape], list[Shape]]:
    """The handles and the targets of `points`, each as its corners; a point has one corner.

    Args:
        points: handles and targets alternating: points (x, y); with `regions` also boxes (left, top, right, bottom) and
            polygons ((x, y), (x, y), (x, y), …).
        size: (W, H) of the picture, within which all of them must lie.

    Raises:
        UserError: there are none, a handle has no target or two, one is no point, or one is outside the picture.
    """
    if not len(points):
        raise UserError("there are no points: give a handle and a target, each as x,y in pixels")
    if len(points) % 2:
        raise UserError(f"{len(points)} points: every handle needs a target, so give an even number")
    shapes = [_corners(point, regions) for point in points]
    for index, shape in enumerate(shapes):
        check_inside(shape, ("handle", "target")[index % 2], size)
    handles, targets = shapes[::2], shapes[1::2]
    goals: dict[Shape, Shape] = {}
    for handle, target in zip(handles, targets, strict=True):
        if (first := goals.setdefault(handle, target)) != target:
            places = " and ".join(",".join(f"{at:g}" for corner in shape for at in corner) for shape in (first, target))
            raise UserError(f"one handle has two targets, {places}: give it one of them")
    return handles, targets


def _corners(point: Any, regions: bool) -> Shape:
    """The corners of one point, box or polygon; UserError if it is none of them."""
    try:
        return _read_corners(tuple(point), point, regions)
    except UserError:
        raise
    except (TypeError, ValueError):
        raise UserError(f"{point!r} is no point: give (x, y) in pixels for each handle and each target") from None


def _read_corners(numbers: tuple[Any, ...], point: Any, regions: bool) -> Shape:
    """The corners of `point`, whose parts are `numbers`; TypeError or ValueError for what are no numbers."""
    if len(numbers) == 2 and not isinstance(numbers[0], Sequence):
        return ((float(numbers[0]), float(numbers[1])),)
    if not regions:
        raise UserError(f"{point} is no point x,y: boxes and polygons need the mode region")
    if len(numbers) == 4 and not isinstance(numbers[0], Sequence):
        left, top, right, bottom = map(float, numbers)
        if left >= right or top >= bottom:
            raise UserError(f"the box {left:g},{top:g},{right:g},{bottom:g} is empty: give left,top,right,bottom")
        return ((left, top), (right, top), (right, bottom), (left, bottom))
    if len(numbers) < 3:
        raise UserError(f"a polygon needs at least three corners, got {len(numbers)}")
    return tuple((float(x), float(y)) for x, y in numbers)


def check_inside(shape: Shape, name: str, size: tuple[int, int]) -> None:
    """UserError unless every corner of `shape`, which the message calls `name`, is in a picture of `size` (W, H)."""
    width, height = size
    for x, y in shape:
        slack = 0 if len(shape) == 1 else 1  # a box may end at the picture's border
        if not (0 <= x < width + slack and 0 <= y < height + slack):
            raise UserError(
                f"{name} {x:g},{y:g} is outside the picture: it is {width}×{height} px, "
                f"so x is 0 to {width - 1} and y 0 to {height - 1}"
            )


def middle(shape: Shape) -> Point:
    """The mean of the corners."""
    return sum(x for x, _ in shape) / len(shape), sum(y for _, y in shape) / len(shape)
