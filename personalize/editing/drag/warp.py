"""The warp of a drag: how far each latent cell is displaced, and which cell's content each cell receives.

For the k handles A_k with vectors V_k = target − handle, factors r_k (h, w) in [0, 1] and weights w_k (h, w) whose sum
over k is one, a cell p of the mask M is displaced by v[p] and the latents Z become Z′:

    v[p] = Σ_k w_k[p] r_k[p] V_k            p′ = round(p + v[p])            Z′[p′] = Z[p]  for p in M

Positions and vectors are (row, column) in latent cells.  A warp is a tensor `source` (h, w): the flat index of the cell
whose content each cell receives, or −1 for a cell that receives none and must be filled.

References: AttentionDrag, arXiv 2506.13301, stage 2; FastDrag, arXiv 2405.15769, "latent warpage".  Which cell wins
where several arrive is decided by our own rule; `backward_warp` follows an idea of Inpaint4Drag.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from personalize.editing.drag.mask import Cell, dilated

NEAREST = 4  # displaced cells whose vectors `backward_warp` averages
CHUNK = 1024  # cells that `backward_warp` handles at a time, which bounds its table of distances
EPSILON = 1e-4  # latent cells, added to distances before dividing by them


def attention_ratio(row: Tensor, handle: Cell, window: int) -> Tensor:
    """Attention of each cell relative to the attention at the handle:  r[p] = a[p] / ā[handle], (h, w), ≥ 0.

    a (h, w) is the handle's attention row.  ā[handle] is the mean of a over the square of `window` cells' side around
    the handle: a row often has a sharp peak at its own cell, and dividing by that peak would make every other ratio
    tiny.  r is set to 1 at the handle itself and may exceed 1 elsewhere.
    """
    around = torch.zeros(row.shape, dtype=torch.bool, device=row.device)
    around[handle] = True
    ratios = row / row[dilated(around, window // 2)].mean().clamp(min=1e-12)
    ratios[handle] = 1.0
    return ratios


def stretch_factors(mask: Tensor, handle: Cell) -> Tensor:
    """FastDrag's stretch factors λ (h, w) in [0, 1]:  λ[C] = |PC| / |AP|.

    A is the handle, C a cell, and P the point where the ray from A through C leaves the circle around the bounding box
    of `mask` (same centre, radius half the diagonal).  λ falls from 1 at A, where the published formula is 0/0, to 0 on
    the circle, and is 0 outside `mask`.
    """
    cells = mask.nonzero().double()
    low, high = cells.amin(0), cells.amax(0)
    centre, radius = (low + high) / 2, (high - low).norm() / 2
    start = torch.tensor(handle, dtype=torch.float64)
    from_handle = cells - start
    length = from_handle.norm(dim=1)
    unit = from_handle / length.clamp(min=EPSILON)[:, None]
    offset = start - centre
    along = unit @ offset
    reach = -along + (along**2 - offset @ offset + radius**2).clamp(min=0).sqrt()  # |AP|
    factors = torch.where(length < EPSILON, 1.0, (1 - length / reach.clamp(min=EPSILON)).clamp(0, 1))
    stretched = torch.zeros(mask.shape)
    stretched[mask] = factors.float()
    return stretched


def displacement_field(
    factors: Tensor, masks: Tensor, handles: Sequence[Cell], vectors: Tensor, weights: str, ratios: Tensor | None = None
) -> Tensor:
    """How far each cell is displaced:  v[p] = Σ_k w_k[p] f_k[p] V_k, (h, w, 2); zero outside all `masks` (k, h, w).

    Args:
        factors: f_k (k, h, w) in [0, 1].
        vectors: V_k (k, 2).
        weights: "distance" makes w_k proportional to 1 / ‖p − A_k‖, "ratio" proportional to r_k, and "winner" gives the
            nearest handle the whole weight.  Vectors with a negative scalar product would cancel one another, so if any
            two have one, the largest weight of a cell becomes 1 and its other weights 0, whatever was chosen.
        ratios: r_k (k, h, w), the attention to each handle in [0, 1]; by default `factors`.
    """
    _, height, width = masks.shape
    grid = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"), -1).float()
    centres = torch.tensor(handles, dtype=torch.float32)
    near = 1 / ((grid[None] - centres[:, None, None]).norm(dim=-1) + EPSILON)
    share = (near if weights != "ratio" else factors if ratios is None else ratios) * masks
    if weights == "winner" or bool((vectors @ vectors.T < 0).any()):
        share = (share == share.amax(0)) & masks
        share = (share & (share.cumsum(0) == 1)).float()  # among equal weights the first handle wins
    share = share / share.sum(0).clamp(min=1e-12)
    return torch.einsum("khw,kc->hwc", share * factors, vectors)


def forward_warp(field: Tensor, mask: Tensor, claim: Tensor) -> Tensor:
    """The warp that moves every cell p of `mask` to round(p + field[p]).

    Where several cells arrive at one place, the one with the highest `claim` (h, w) wins, among equal claims the first
    in raster order.  Cells that would leave the latent grid are dropped.
    """
    height, width = mask.shape
    cells = mask.nonzero().numpy()
    aims = np.floor(cells + field[mask].numpy() + 0.5).astype(np.int64)  # halves round up, always
    order = np.argsort(-claim[mask].numpy(), kind="stable")
    cells, aims = cells[order], aims[order]
    inside = ((aims >= 0) & (aims < (height, width))).all(1)
    destinations, first = np.unique(aims[inside] @ (width, 1), return_index=True)
    source = _emptied(mask)
    source[torch.from_numpy(destinations)] = torch.from_numpy((cells[inside] @ (width, 1))[first])
    return source.view(height, width)


def backward_warp(field: Tensor, mask: Tensor) -> Tensor:
    """The warp found from each destination q:  source[q] = round(q − v̂(q)), if that cell is in `mask`.

    v̂(q) is the mean of the vectors of the four displaced cells p + v[p] nearest to q, weighted by inverse distance.  So
    no two cells collide, and the moved region has no holes inside.
    """
    height, width = mask.shape
    vectors = field[mask]
    displaced = mask.nonzero() + vectors
    grid = torch.cartesian_prod(torch.arange(height), torch.arange(width))
    source = _emptied(mask)
    for part in torch.arange(len(grid)).split(CHUNK):
        distance, index = torch.cdist(grid[part].float(), displaced).topk(min(NEAREST, len(displaced)), largest=False)
        share = 1 / (distance + EPSILON**2)
        back = ((share / share.sum(1, keepdim=True))[..., None] * vectors[index]).sum(1)
        origin = (grid[part] - back + 0.5 - EPSILON).floor().long()  # rounds halves down: the inverse of `forward_warp`
        inside = ((origin >= 0) & (origin < torch.tensor([height, width]))).all(1)
        inside[inside.clone()] = mask[tuple(origin[inside].T)]
        source[part[inside]] = origin[inside] @ torch.tensor([width, 1])
    return source.view(height, width)


def warped(latents: Tensor, source: Tensor) -> Tensor:
    """`latents` (b, c, h, w) after the warp `source` (h, w); cells without content are 0."""
    taken = latents.flatten(2)[..., source.clamp(min=0).flatten().to(latents.device)].view_as(latents)
    return taken * (source >= 0).to(latents)


def _emptied(mask: Tensor) -> Tensor:
    """The warp, flat (h w), that keeps every cell outside `mask` and leaves those inside without content."""
    source = torch.arange(mask.numel())
    source[mask.flatten()] = -1
    return source
