"""Which cells a drag moves: masks on the latent grid, boolean (h, w), True where the picture may change.

Cells are written (row, column).  A mask is closed by one cell, so that its parts hang together where they touch, and
only the part that holds the handle is kept: attention knows kinds of things, not single ones; a twin would move too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

from personalize.errors import UserError

Cell = tuple[int, int]
HALVINGS = 14  # of an interval of thresholds


def ratio_mask(ratio: Tensor, handle: Cell, threshold: float, *, fewest: int, most: float) -> tuple[Tensor, float]:
    """M[p] = [r[p] > τ], closed by one cell, the part that holds the handle, its holes filled; and the τ it took.

    τ is `threshold` unless M then has fewer than `fewest` cells or more than the share `most` of the grid; if so, it is
    the nearest τ, found by bisection, whose M keeps that limit.  A higher τ never gives a larger mask.

    Args:
        ratio: r (h, w) ≥ 0, not clamped above 1, so that there always is a larger τ.

    Raises:
        UserError: no τ keeps both limits, as when attention is the same everywhere.

    Reference: AttentionDrag, arXiv 2506.13301, stage 1; the cleaning and the limits are ours.
    """
    limit = max(fewest, int(most * ratio.numel()))

    def mask(value: float) -> Tensor:
        return filled(component(closed((ratio > value) | _single(ratio, handle)), handle))

    found, value = mask(threshold), threshold
    if found.sum() > limit:
        value = _bisected(lambda value: int(mask(value).sum()) <= limit, threshold, float(ratio.max()))
    elif found.sum() < fewest:
        value = _bisected(lambda value: int(mask(value).sum()) >= fewest, threshold, -1e-6)
    found = mask(value)
    if not fewest <= found.sum() <= limit:
        raise UserError(
            f"attention does not set the handle at cell (x {handle[1]}, y {handle[0]}) apart from the rest of the "
            "picture: put it on the thing that is to move, or give a mask"
        )
    return found, value


def _bisected(good, bad_end: float, good_end: float) -> float:
    """The value nearest to `bad_end`, up to 2⁻¹⁴ of the interval, that is `good`, which `good_end` is."""
    for _ in range(HALVINGS):
        middle = (bad_end + good_end) / 2
        bad_end, good_end = (bad_end, middle) if good(middle) else (middle, good_end)
    return good_end


def shared(mask: Tensor, handles: Sequence[Cell]) -> Tensor:
    """A user's mask divided among handles, (k, h, w): each has its own part, parts without handle belong to all."""
    own = [component(mask, handle) for handle in handles]
    rest = mask & ~torch.stack(own).any(0)
    return torch.stack([part | rest for part in own])


def dilated(mask: Tensor, cells: int = 1) -> Tensor:
    """`mask` and all cells at most `cells` away from it, along rows, columns and diagonals."""
    return max_pool2d(mask[None, None].float(), 2 * cells + 1, 1, cells)[0, 0] > 0


def closed(mask: Tensor) -> Tensor:
    """`mask` dilated, then eroded by one cell; beyond the frame counts as mask, so its border loses nothing."""
    return ~dilated(~dilated(mask))


def component(mask: Tensor, cell: Cell) -> Tensor:
    """The part of `mask` that hangs together with `cell`, diagonals included; empty if `cell` is not in it."""
    return _spread(_single(mask, cell) & mask, mask, dilated)


def filled(mask: Tensor) -> Tensor:
    """`mask` and its holes: what cannot be reached from the frame along rows and columns."""
    border = torch.ones_like(mask)
    border[1:-1, 1:-1] = False
    return ~_spread(border & ~mask, ~mask, _beside)


def _spread(found: Tensor, within: Tensor, grow) -> Tensor:
    while True:
        grown = grow(found) & within
        if torch.equal(grown, found):
            return found
        found = grown


def _beside(mask: Tensor) -> Tensor:
    picture = mask[None, None].float()
    return (max_pool2d(picture, (3, 1), 1, (1, 0)) + max_pool2d(picture, (1, 3), 1, (0, 1)))[0, 0] > 0


def _single(like: Tensor, cell: Cell) -> Tensor:
    one = torch.zeros(like.shape, dtype=torch.bool, device=like.device)
    one[cell] = True
    return one
