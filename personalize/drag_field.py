"""Where each cell goes: displacements from attention ratios or FastDrag's stretch, and the warp they make.

With k handles A_k, their vectors V_k = target − handle, ratios r_k (h, w) in 0..1 and weights w_k that sum to one,

    v[p] = Σ_k w_k[p] r_k[p] V_k            p′ = round(p + v[p])            Z′[p′] = Z[p]  for p in the mask M

Cells and vectors are (row, column), in latent cells; a warp is `source` (h, w), the flat number of the cell whose
content each cell gets, −1 where there is none.

References: AttentionDrag, arXiv 2506.13301, stage 2; FastDrag, arXiv 2405.15769, "latent warpage"; the order of
collisions is ours, the mapping backwards an idea of Inpaint4Drag.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from personalize.drag_mask import Cell, dilated

NEAREST = 4  # displaced cells whose vectors are averaged in the mapping backwards
CHUNK = 1024  # cells mapped backwards at a time: bounds the table of distances
FAR = 1e-4  # cells, added to distances


def ratio(row: Tensor, handle: Cell, window: int) -> Tensor:
    """r[p] = a[p] / a[handle] (h, w) ≥ 0 of an attention row a (h, w); the denominator is a mean around the handle.

    `window` is the side, in cells, of the square averaged: a row that peaks at its own cell would leave the others
    next to nothing.  r is 1 at the handle.
    """
    around = torch.zeros(row.shape, dtype=torch.bool, device=row.device)
    around[handle] = True
    found = row / row[dilated(around, window // 2)].mean().clamp(min=1e-12)
    found[handle] = 1.0
    return found


def stretch(mask: Tensor, handle: Cell) -> Tensor:
    """FastDrag's factors λ (h, w) in 0..1:  λ[C] = |PC| / |AP|,  P where the ray from A through C leaves the circle.

    The circle stands on the bounding box of `mask`: its centre, half its diagonal.  λ falls from 1 at A, where the
    published formula is 0/0, to 0 on the circle.  0 outside `mask`.
    """
    cells = mask.nonzero().double()
    low, high = cells.amin(0), cells.amax(0)
    centre, radius = (low + high) / 2, (high - low).norm() / 2
    start = torch.tensor(handle, dtype=torch.float64)
    way = cells - start
    length = way.norm(dim=1)
    unit = way / length.clamp(min=FAR)[:, None]
    offset = start - centre
    along = unit @ offset
    reach = -along + (along**2 - offset @ offset + radius**2).clamp(min=0).sqrt()  # |AP|
    factors = torch.where(length < FAR, 1.0, (1 - length / reach.clamp(min=FAR)).clamp(0, 1))
    found = torch.zeros(mask.shape)
    found[mask] = factors.float()
    return found


def displacement(ratios: Tensor, masks: Tensor, handles: Sequence[Cell], vectors: Tensor, weights: str) -> Tensor:
    """v (h, w, 2) of the module's equation; cells outside all `masks` (k, h, w) stay.

    Args:
        ratios: r_k (k, h, w) in 0..1.
        vectors: V_k (k, 2).
        weights: w_k ∝ "distance", 1 / ‖p − A_k‖, ∝ "ratio", r_k, or "winner", the nearest handle alone.  Vectors that
            oppose one another would cancel: where there are such, the largest weight takes all.
    """
    _, height, width = masks.shape
    grid = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"), -1).float()
    centres = torch.tensor(handles, dtype=torch.float32)
    near = 1 / ((grid[None] - centres[:, None, None]).norm(dim=-1) + FAR)
    share = (ratios if weights == "ratio" else near) * masks
    if weights == "winner" or bool((vectors @ vectors.T < 0).any()):
        share = (share == share.amax(0)) & masks
        share = (share & (share.cumsum(0) == 1)).float()  # the first of equals
    share = share / share.sum(0).clamp(min=1e-12)
    return torch.einsum("khw,kc->hwc", share * ratios, vectors)


def forward(field: Tensor, mask: Tensor, claim: Tensor) -> Tensor:
    """Push every cell of `mask` along `field`; where several arrive the highest `claim` (h, w) wins.

    Equal claims: the first in raster order.  What leaves the frame is dropped.
    """
    height, width = mask.shape
    cells = mask.nonzero().numpy()
    aims = np.floor(cells + field[mask].numpy() + 0.5).astype(np.int64)  # halves go one way, so rigid shifts stay rigid
    order = np.argsort(-claim[mask].numpy(), kind="stable")
    cells, aims = cells[order], aims[order]
    inside = ((aims >= 0) & (aims < (height, width))).all(1)
    reached, first = np.unique(aims[inside] @ (width, 1), return_index=True)
    source = _still(mask)
    source[torch.from_numpy(reached)] = torch.from_numpy((cells[inside] @ (width, 1))[first])
    return source.view(height, width)


def backward(field: Tensor, mask: Tensor) -> Tensor:
    """Ask of every cell where its content came from: source = round(q − v̂(q)), where that lies in `mask`.

    v̂ averages the vectors of the four displaced cells p + v[p] nearest to q, weighted by inverse distance: there are
    no collisions and no holes inside what moved.
    """
    height, width = mask.shape
    vectors = field[mask]
    landed = mask.nonzero() + vectors
    grid = torch.cartesian_prod(torch.arange(height), torch.arange(width))
    source = _still(mask)
    for part in torch.arange(len(grid)).split(CHUNK):
        distance, index = torch.cdist(grid[part].float(), landed).topk(min(NEAREST, len(landed)), largest=False)
        share = 1 / (distance + FAR**2)
        back = ((share / share.sum(1, keepdim=True))[..., None] * vectors[index]).sum(1)
        origin = (grid[part] - back + 0.5 - FAR).floor().long()  # the mirror image of `forward`'s rounding
        inside = ((origin >= 0) & (origin < torch.tensor([height, width]))).all(1)
        inside[inside.clone()] = mask[tuple(origin[inside].T)]
        source[part[inside]] = origin[inside] @ torch.tensor([width, 1])
    return source.view(height, width)


def moved(latents: Tensor, source: Tensor) -> Tensor:
    """`latents` (b, c, h, w) warped; cells without source are 0."""
    taken = latents.flatten(2)[..., source.clamp(min=0).flatten().to(latents.device)].view_as(latents)
    return taken * (source >= 0).to(latents)


def _still(mask: Tensor) -> Tensor:
    """The warp that empties `mask` and leaves all else, flat (h w)."""
    numbers = torch.arange(mask.numel())
    numbers[mask.flatten()] = -1
    return numbers
