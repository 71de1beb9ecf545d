"""The size at which an adapter was trained, as its manifest says, checked against what the base draws."""

from __future__ import annotations

from typing import Any

from personalize.errors import UserError

MAX_SIZE = 4  # times the base's resolution: the largest size that is taken from an adapter's file


def trained_size(size: Any, resolution: int) -> tuple[int, int]:
    """Height and width in pixels that `size` names; without one, the base's own `resolution` on both sides.

    UserError if it is anything but two sides of at most `MAX_SIZE` times the base's own: whoever wants larger pictures
    asks for them.
    """
    largest = MAX_SIZE * resolution
    size = size or (resolution,) * 2
    if not isinstance(size, list | tuple) or [type(side) for side in size] != [int, int]:
        raise UserError(f"the adapter says it was trained at {str(size)[:40]}, a height and a width were expected")
    if not all(0 < side <= largest for side in size):
        raise UserError(
            f"the adapter says it was trained at {str(size[0])[:12]}×{str(size[1])[:12]} px, the base draws "
            f"{resolution} px, at most {largest} were expected: correct size in its adapter.json"
        )
    return size[0], size[1]
