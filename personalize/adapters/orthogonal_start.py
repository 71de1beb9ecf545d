"""Orthogonal start of a LoRA layer (Ortho-LoRA): it learns from components that are orthonormal from the first update.

    ΔW = s · (P diag(λ) Q − P₀ diag(λ₀) Q₀)          P (out, r), Q (r, in) orthonormal, λ (r)

P, λ and Q are trained; P₀, λ₀ and Q₀ are their frozen copies, so that ΔW = 0 at the start.  As a plain LoRA it has rank
2r:  B = [P diag(λ), −P₀ diag(λ₀)],  A = [Q; Q₀].  With a plain start, B = 0 gives A no gradient in the first update.

λ₀ are the r smallest singular values of a Gaussian matrix of the layer's shape and of standard deviation 1/r, the same
for all layers of one shape.  Such a matrix's singular vectors are uniformly distributed orthonormal frames, independent
of its singular values; P₀ and Q₀ are drawn as such frames, for each layer anew.  A convolution counts as its matrix
(out, in·k·k).  A layer narrower than r has min(out, in·k·k) components, the others stay zero.

References: Soboleva et al., "T-LoRA", arXiv 2507.05964, §4.2.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from personalize.randomness import generator


class _StackedA(nn.Module):
    """A = [Q; Q₀] from the trained Q (r, in[, k, k])."""

    start: Tensor

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.register_buffer("start", start)

    def forward(self, q: Tensor) -> Tensor:
        return torch.cat([q, self.start])


class _StackedB(nn.Module):
    """B = [P diag(λ), −P₀ diag(λ₀)] from the trained P (out, r[, 1, 1]); λ is trained here."""

    start: Tensor

    def __init__(self, scales: Tensor, p: Tensor) -> None:
        super().__init__()
        self.scales = nn.Parameter(scales.clone())
        self.register_buffer("start", -self._scaled(p, scales))

    def forward(self, p: Tensor) -> Tensor:
        return torch.cat([self._scaled(p, self.scales), self.start], 1)

    @staticmethod
    def _scaled(p: Tensor, scales: Tensor) -> Tensor:
        return p * scales.view(1, -1, *(1,) * (p.ndim - 2))


def start_orthogonal(down: nn.Module, up: nn.Module, rank: int, seed: int, key: str, device: torch.device) -> None:
    """Give `down` (A) and `up` (B) of a LoRA layer, of rank 2r, the orthogonal start of `rank` r, in fp32.

    The frames are drawn by a generator keyed by `seed` and `key`, the scales by one keyed by `seed` and the shape.
    """
    below, above = down.get_parameter("weight").shape, up.get_parameter("weight").shape
    outer, columns = above[0], below[1:].numel()
    count = min(rank, outer, columns)
    rng = generator(seed, f"orthogonal/{key}")
    p, q = torch.zeros(outer, rank), torch.zeros(rank, columns)
    p[:, :count], q[:count] = _frame(outer, count, rng), _frame(columns, count, rng).T
    scales = torch.zeros(rank)
    where = device if device.type == "cuda" else torch.device("cpu")  # in fp64, which MPS has not
    scales[:count] = _scales(outer, columns, rank, seed, where)[-count:]
    p, q = p.view(outer, rank, *above[2:]).to(device), q.view(rank, *below[1:]).to(device)
    for module, start, stacked in ((down, q, _StackedA(q.clone())), (up, p, _StackedB(scales.to(device), p))):
        module.weight = nn.Parameter(start)
        parametrize.register_parametrization(module, "weight", stacked, unsafe=True)  # it changes the shape


def orthogonal_parameters(down: nn.Module, up: nn.Module) -> list[nn.Parameter]:
    """Q, P and λ of a layer that `start_orthogonal` made; empty for any other."""
    if not parametrize.is_parametrized(down):
        return []
    return [*down.parametrizations.parameters(), *up.parametrizations.parameters()]  # pyright: ignore


def _frame(size: int, count: int, rng: torch.Generator) -> Tensor:
    """`count` orthonormal columns (size, count), uniformly distributed."""
    q, r = torch.linalg.qr(torch.randn(size, count, generator=rng, dtype=torch.float64))
    return (q * r.diagonal().sign()).float()


@cache
def _scales(outer: int, columns: int, rank: int, seed: int, device: torch.device) -> Tensor:
    """The singular values of a Gaussian matrix (outer, columns) of standard deviation 1/`rank`, in falling order."""
    matrix = torch.randn(outer, columns, generator=generator(seed, f"orthogonal/{outer}x{columns}"))
    return torch.linalg.svdvals(matrix.to(device, torch.float64)).float().cpu() / rank
