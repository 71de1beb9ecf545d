"""Masks of a drag: boolean (h, w) on the latent grid, True for the cells that move.

Cells are (row, column).  An automatic mask is closed by one cell, which joins parts that almost touch; then only the
connected part that contains the handle is kept.  Attention finds all things of a kind, so that without this a second,
similar thing elsewhere in the picture would move too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
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
    own = own_parts(mask, handles)
    return own | (mask & ~own.any(0))


def own_parts(mask: Tensor, handles: Sequence[Cell]) -> Tensor:
    """The connected part of `mask` (h, w) that contains each handle, (k, h, w); empty for a handle beside it."""
    return torch.stack([connected_component(mask, handle) for handle in handles])


def dilated(mask: Tensor, cells: int = 1) -> Tensor:
    """`mask` and all cells at most `cells` away from it, along rows, columns and diagonals."""
    return _spread(_spread(mask, cells, 0), cells, 1)


def box(mask: Tensor) -> tuple[slice, slice]:
    """The smallest rectangle that contains the True cells of `mask` (h, w), as slices of its rows and columns."""
    rows, columns = (mask.any(1 - axis).nonzero()[:, 0] for axis in (0, 1))
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


def closed(mask: Tensor) -> Tensor:
    """`mask` after a morphological closing by one cell; beyond the grid counts as True, so the border loses nothing."""
    return ~dilated(~dilated(mask))


def connected_component(mask: Tensor, cell: Cell) -> Tensor:
    """The 8-connected part of `mask` that contains `cell`; empty if `cell` is not in `mask`."""
    return _flood_filled(_single_cell(mask, cell) & mask, mask, diagonals=True)


def connected_parts(mask: Tensor) -> np.ndarray:
    """A number above 0 for each 8-connected part of `mask`, (h, w); 0 outside of it."""
    allowed = mask.numpy()
    parts = np.where(allowed, np.arange(1.0, allowed.size + 1).reshape(allowed.shape), 0.0)
    across, down = _runs(allowed), _runs(allowed.T).T
    while True:
        grown = np.where(allowed, max_pool2d(torch.from_numpy(parts)[None, None], 3, 1, 1)[0, 0].numpy(), 0.0)
        for runs in (across, down):
            most = np.zeros(runs.max() + 1)
            np.maximum.at(most, runs, grown)
            grown = np.where(allowed, most[runs], 0.0)
        if np.array_equal(grown, parts):
            return parts.astype(np.int64)
        parts = grown


def without_holes(mask: Tensor) -> Tensor:
    """`mask` with its holes filled: False cells that no 4-connected path of False cells joins to the border."""
    border = torch.ones_like(mask)
    border[1:-1, 1:-1] = False
    return ~_flood_filled(border & ~mask, ~mask, diagonals=False)


def _spread(mask: Tensor, reach: int, axis: int) -> Tensor:
    """`mask` (h, w) and all cells at most `reach` away along `axis`; each round doubles the distance covered.

    A round may not go farther: beside the grid's border a cell has neighbours on one side alone to be copied from.
    """
    covered = 0
    while covered < reach:
        step = min(covered + 1, reach - covered)
        wide, rest = mask.clone(), mask.shape[axis] - step
        if rest > 0:
            wide.narrow(axis, step, rest).logical_or_(mask.narrow(axis, 0, rest))
            wide.narrow(axis, 0, rest).logical_or_(mask.narrow(axis, step, rest))
        mask, covered = wide, covered + step
    return mask


def _flood_filled(seed: Tensor, within: Tensor, *, diagonals: bool) -> Tensor:
    """The cells of `within` that paths inside it join to `seed`: whole runs along rows and columns at a time."""
    found, allowed = seed.numpy(), within.numpy()
    across, down = _runs(allowed), _runs(allowed.T).T
    while True:
        grown = dilated(torch.from_numpy(found)).numpy() & allowed if diagonals else found
        for runs in (across, down):
            grown = np.isin(runs, runs[grown], kind="table") & allowed
        if np.array_equal(grown, found):
            return torch.from_numpy(found)
        found = grown


def _runs(mask: np.ndarray) -> np.ndarray:
    """Numbers (h, w) that are equal for the True cells of one row that lie side by side, and different for others."""
    starts = mask.copy()
    starts[:, 1:] &= ~mask[:, :-1]
    return np.cumsum(starts).reshape(mask.shape)


def _single_cell(like: Tensor, cell: Cell) -> Tensor:
    mask = torch.zeros(like.shape, dtype=torch.bool, device=like.device)
    mask[cell] = True
    return mask
