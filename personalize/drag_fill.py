"""What comes where something went away: the empty cells U of a warp, filled from the cells Ω that may be looked at.

    Z′[u] = Σ_{q∈Ω} Ā[u, q] Z[q]            Ā: attention of u, renormalised over Ω

At the noise levels where drags work Z is mostly noise, and a mean of noises is too small: √(Σ w²) of its size.
Repaired, the means are of the clean estimates, over the heaviest weights only, with noise at full strength on top:

    Z′[u] = √ᾱ Σ Ā[u, q] x̂0[q] + √(1−ᾱ) n

References: AttentionDrag, arXiv 2506.13301, stage 3; FastDrag, arXiv 2405.15769, for the neighbours' interpolation.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

Rows = Callable[[Tensor], Tensor]  # cells (m, 2) → their attention (m, h, w)
CHUNK = 256  # cells whose attention is held at a time


def repaired(z: Tensor, clean: Tensor, alpha: float, cells: Tensor, omega: Tensor, rows: Rows, top: int,
             noise: Tensor | None) -> Tensor:  # fmt: skip
    """Contents (c, m) of the empty `cells` (m, 2), mean and noise as in the module's second equation.

    Args:
        z, clean: latents at the level ᾱ = `alpha`, and their clean estimates x̂0, (1, c, h, w).
        omega: Ω, boolean (h, w).
        top: how many weights are kept.
        noise: n (1, c, h, w) in units of the noise in Ω, whose root mean square it is given per channel; None takes
            that of the heaviest cell.
    """
    if len(cells) == 0:
        return z.new_zeros(z.shape[1], 0)
    eps = ((z - alpha**0.5 * clean) / (1 - alpha) ** 0.5)[0].flatten(1)
    weights, index = (torch.cat(parts) for parts in zip(*_heaviest(cells, omega, rows, top), strict=True))
    means = (clean[0].flatten(1)[:, index.to(z.device)] * weights.to(z)).sum(-1)
    if noise is None:
        drawn = eps[:, index[:, 0].to(z.device)]
    else:
        level = eps[:, omega.flatten().to(z.device)].square().mean(1, keepdim=True).sqrt()
        drawn = noise.to(z)[0][:, cells[:, 0], cells[:, 1]] * level
    return alpha**0.5 * means + (1 - alpha) ** 0.5 * drawn


def averaged(z: Tensor, cells: Tensor, omega: Tensor, rows: Rows) -> Tensor:
    """Contents (c, m) by the first equation, to the letter: too little noise, for comparison."""
    if len(cells) == 0:
        return z.new_zeros(z.shape[1], 0)
    flat = z[0].flatten(1)
    parts = [flat @ _over(part, omega, rows).to(z).T for part in cells.split(CHUNK)]
    return torch.cat(parts, 1)


def neighbours(moved: Tensor, void: Tensor) -> Tensor:
    """FastDrag's fill (1, c, h, w): the nearest full cells left, right, above and below, weighted by 1 / distance.

    In raster order, cells that were filled before count as full.
    """
    values, full = moved[0].cpu().numpy().copy(), ~void.numpy()
    for y, x in void.nonzero().tolist():
        found = [(x - i, values[:, y, i]) for i in np.flatnonzero(full[y, :x])[-1:]]
        found += [(i + 1, values[:, y, x + 1 + i]) for i in np.flatnonzero(full[y, x + 1 :])[:1]]
        found += [(y - i, values[:, i, x]) for i in np.flatnonzero(full[:y, x])[-1:]]
        found += [(i + 1, values[:, y + 1 + i, x]) for i in np.flatnonzero(full[y + 1 :, x])[:1]]
        total = sum(1 / distance for distance, _ in found)
        if found:
            values[:, y, x] = sum(value / distance for distance, value in found) / total
            full[y, x] = True
    return torch.from_numpy(values)[None].to(moved)


def _heaviest(cells: Tensor, omega: Tensor, rows: Rows, top: int) -> list[tuple[Tensor, Tensor]]:
    """Per chunk: the `top` largest weights (m, top), summing to one, and the flat cells they belong to."""
    found = []
    for part in cells.split(CHUNK):
        weights, index = _over(part, omega, rows).topk(min(top, int(omega.sum())), dim=1)
        found.append((weights / weights.sum(1, keepdim=True), index))
    return found


def _over(cells: Tensor, omega: Tensor, rows: Rows) -> Tensor:
    """Ā (m, h w): attention of `cells`, zero outside Ω, summing to one."""
    weights = (rows(cells) + 1e-12).flatten(1) * omega.flatten()
    return weights / weights.sum(1, keepdim=True)
