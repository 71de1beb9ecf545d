"""Masks of a drag: boolean (h, w) on the latent grid, True for the cells that move.

Cells are (row, column).  An automatic mask is closed by one cell, which joins parts that almost touch; then only the
connected part that contains the handle is kept.  Attention finds all things of a kind, so that without this a second,
similar thing elsewhere in the picture would move too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

from personalize.errors import UserError

Cell = tuple[int, int]
BISECTIONS = 14  # steps of the search for a threshold


def ratio_mask(ratio: Tensor, handle: Cell, threshold: float, *, fewest: int, most: float) -> tuple[Tensor, float]:
    """The automatic mask of one handle, M[p] = (r[p] > τ) after cleaning, and the threshold τ that was used.

    Cleaning closes M by one cell, keeps the connected part that contains the handle, and fills its holes.  τ is
    `threshold`, unless M then has fewer than `fewest` cells or more than the fraction `most` of the grid; then τ is the
    value nearest to `threshold`, found by bisection, at which M is within that limit.  A higher τ never gives a larger
    mask.

    Args:
        ratio: r (h, w) ≥ 0; it is not clamped to 1, so that τ can always be raised.

    Raises:
        UserError: no τ satisfies both limits, for example because the attention is the same everywhere.

    Reference: AttentionDrag, arXiv 2506.13301, stage 1; the cleaning and the limits are ours.
    """
    limit = max(fewest, int(most * ratio.numel()))

    def mask(value: float) -> Tensor:
        return without_holes(connected_component(closed((ratio > value) | _single_cell(ratio, handle)), handle))

    size, value = mask(threshold).sum(), threshold
    if size > limit:
        value = _bisected(lambda value: int(mask(value).sum()) <= limit, threshold, float(ratio.max()))
    elif size < fewest:
        value = _bisected(lambda value: int(mask(value).sum()) >= fewest, threshold, -1e-6)
    result = mask(value)
    if not fewest <= result.sum() <= limit:
        raise UserError(
            f"attention does not set the handle at cell (x {handle[1]}, y {handle[0]}) apart from the rest of the "
            "picture: put the handle on the thing that is to move, or give a mask"
        )
    return result, value


def _bisected(accepts: Callable[[float], bool], bad_end: float, good_end: float) -> float:
    """The value nearest to `bad_end` that `accepts`, to 2⁻¹⁴ of the interval; `good_end` must be accepted."""
    for _ in range(BISECTIONS):
        middle = (bad_end + good_end) / 2
        bad_end, good_end = (bad_end, middle) if accepts(middle) else (middle, good_end)
    return good_end


def masks_per_handle(mask: Tensor, handles: Sequence[Cell]) -> Tensor:
    """A user's mask (h, w) divided among the handles, (k, h, w).

    Each handle gets the connected part that contains it; parts that contain no handle belong to every handle.
    """
    own = [connected_component(mask, handle) for handle in handles]
    rest = mask & ~torch.stack(own).any(0)
    return torch.stack([part | rest for part in own])


def dilated(mask: Tensor, cells: int = 1) -> Tensor:
    """`mask` and all cells at most `cells` away from it, along rows, columns and diagonals."""
    side = 2 * cells + 1
    rows = max_pool2d(mask[None, None].float(), (side, 1), 1, (cells, 0))
    return max_pool2d(rows, (1, side), 1, (0, cells))[0, 0] > 0


def closed(mask: Tensor) -> Tensor:
    """`mask` after a morphological closing by one cell; beyond the grid counts as True, so the border loses nothing."""
    return ~dilated(~dilated(mask))


def connected_component(mask: Tensor, cell: Cell) -> Tensor:
    """The 8-connected part of `mask` that contains `cell`; empty if `cell` is not in `mask`."""
    return _flood_filled(_single_cell(mask, cell) & mask, mask, dilated)


def without_holes(mask: Tensor) -> Tensor:
    """`mask` with its holes filled: False cells that no 4-connected path of False cells joins to the border."""
    border = torch.ones_like(mask)
    border[1:-1, 1:-1] = False
    return ~_flood_filled(border & ~mask, ~mask, _grown_by_edges)


def _flood_filled(seed: Tensor, within: Tensor, grow: Callable[[Tensor], Tensor]) -> Tensor:
    """The cells of `within` that are reached from `seed` by growing it until nothing is added."""
    while True:
        grown = grow(seed) & within
        if torch.equal(grown, seed):
            return seed
        seed = grown


def _grown_by_edges(mask: Tensor) -> Tensor:
    """`mask` and the cells directly left, right, above and below of it."""
    picture = mask[None, None].float()
    return (max_pool2d(picture, (3, 1), 1, (1, 0)) + max_pool2d(picture, (1, 3), 1, (0, 1)))[0, 0] > 0


def _single_cell(like: Tensor, cell: Cell) -> Tensor:
    mask = torch.zeros(like.shape, dtype=torch.bool, device=like.device)
    mask[cell] = True
    return mask
