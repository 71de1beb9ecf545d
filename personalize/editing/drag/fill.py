"""Filling the latent cells U that a drag left empty, from the other cells Ω.

AttentionDrag fills a cell u with a mean of the noisy latents Z, weighted by the attention Ā of u renormalised over Ω:

    Z′[u] = Σ_{q∈Ω} Ā[u, q] Z[q]                          (1)

At the noise levels at which a drag works Z is mostly noise, and averaging independent noise shrinks its standard
deviation by √(Σ_q Ā[u, q]²): the filled cells have too little noise.  Our variant averages the clean estimates x̂0
instead, over the few largest weights, and adds noise n of the full standard deviation:

    Z′[u] = √ᾱ Σ_q Ā[u, q] x̂0[q] + √(1−ᾱ) n[u]           (2)

References: AttentionDrag, arXiv 2506.13301, stage 3; FastDrag, arXiv 2405.15769, for "bilateral nearest neighbor
interpolation" (BNNI).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

Rows = Callable[[Tensor], Tensor]  # cells (m, 2) → their attention (m, h, w)
CHUNK = 256  # cells whose attention rows are in memory at a time


def attention_fill(z: Tensor, clean: Tensor, alpha: float, cells: Tensor, omega: Tensor, rows: Rows, top: int,
             noise: Tensor | None) -> Tensor:  # fmt: skip
    """Contents (c, m) of the empty `cells` (m, 2) by equation (2), whose noise has the full standard deviation.

    Args:
        z, clean: the latents at the noise level ᾱ = `alpha` and their clean estimates x̂0, both (1, c, h, w).
        omega: Ω, boolean (h, w).
        rows: gives the attention (m, h, w) of cells (m, 2).
        top: number of weights kept for each cell.
        noise: standard normal n (1, c, h, w), scaled for each channel to the root mean square of the noise in Ω.  With
            None, n[u] is the noise that z has at the cell with the largest weight.
    """
    if len(cells) == 0:
        return z.new_zeros(z.shape[1], 0)
    eps = ((z - alpha**0.5 * clean) / (1 - alpha) ** 0.5)[0].flatten(1)
    weights, index = _largest_weights(cells, omega, rows, top)
    means = _weighted_means(clean, weights, index)
    if noise is None:
        drawn = eps[:, index[:, 0].to(z.device)]
    else:
        level = eps[:, omega.flatten().to(z.device)].square().mean(1, keepdim=True).sqrt()
        drawn = noise.to(z)[0][:, cells[:, 0], cells[:, 1]] * level
    return alpha**0.5 * means + (1 - alpha) ** 0.5 * drawn


def attention_means(clean: Tensor, cells: Tensor, omega: Tensor, rows: Rows, top: int) -> Tensor:
    """The means (c, m) of equation (2), Σ_q Ā[u, q] x̂0[q], for the `cells` u (m, 2) of clean latents (1, c, h, w)."""
    return _weighted_means(clean, *_largest_weights(cells, omega, rows, top))


def raw_attention_fill(z: Tensor, cells: Tensor, omega: Tensor, rows: Rows) -> Tensor:
    """Contents (c, m) of the empty `cells` (m, 2) by equation (1), exactly as published; it has too little noise."""
    if len(cells) == 0:
        return z.new_zeros(z.shape[1], 0)
    flat = z[0].flatten(1)
    parts = [flat @ _renormalised(part, omega, rows).to(z).T for part in cells.split(CHUNK)]
    return torch.cat(parts, 1)


def bnni_fill(latents: Tensor, void: Tensor) -> Tensor:
    """FastDrag's BNNI: `latents` (1, c, h, w) with the empty cells `void` (h, w) filled from their row and column.

    Each gets the mean of the nearest full cells to its left, its right, above and below, weighted by 1 / distance.
    Cells are filled in raster order, and a filled cell counts as full for the next ones.
    """
    values, full = latents[0].cpu().numpy().copy(), ~void.numpy()
    for y, x in void.nonzero().tolist():
        nearest = [(x - i, values[:, y, i]) for i in np.flatnonzero(full[y, :x])[-1:]]
        nearest += [(i + 1, values[:, y, x + 1 + i]) for i in np.flatnonzero(full[y, x + 1 :])[:1]]
        nearest += [(y - i, values[:, i, x]) for i in np.flatnonzero(full[:y, x])[-1:]]
        nearest += [(i + 1, values[:, y + 1 + i, x]) for i in np.flatnonzero(full[y + 1 :, x])[:1]]
        total = sum(1 / distance for distance, _ in nearest)
        if nearest:
            values[:, y, x] = sum(value / distance for distance, value in nearest) / total
            full[y, x] = True
    return torch.from_numpy(values)[None].to(latents)


def _largest_weights(cells: Tensor, omega: Tensor, rows: Rows, top: int) -> tuple[Tensor, Tensor]:
    """For each of the `cells` (m, 2) its `top` largest weights (m, top), summing to one, and their flat indices."""
    chunks = []
    for part in cells.split(CHUNK):
        weights, index = _renormalised(part, omega, rows).topk(min(top, int(omega.sum())), dim=1)
        chunks.append((weights / weights.sum(1, keepdim=True), index))
    weights, index = (torch.cat(parts) for parts in zip(*chunks, strict=True))
    return weights, index


def _weighted_means(clean: Tensor, weights: Tensor, index: Tensor) -> Tensor:
    """The means (c, m) of latents (1, c, h, w) over the flat indices `index` (m, top), with `weights` (m, top)."""
    return (clean[0].flatten(1)[:, index.to(clean.device)] * weights.to(clean)).sum(-1)


def _renormalised(cells: Tensor, omega: Tensor, rows: Rows) -> Tensor:
    """Ā (m, h w): the attention of `cells`, set to zero outside Ω and scaled to sum to one."""
    weights = (rows(cells) + 1e-12).flatten(1) * omega.flatten()
    return weights / weights.sum(1, keepdim=True)
