"""3×3 convolutions with 16 products for 4 pixels instead of 36, as exact in fp32 as the direct ones.

    Y = Aᵀ [ (G g Gᵀ) ⊙ (Bᵀ d B) ] A        F(2×2, 3×3); d: a 4×4 tile of pixels, g: a filter, Y: 2×2 pixels

Channels are summed between ⊙ and A, by 16 matrix products.  Filters are transformed anew in each call, and nothing is
kept but the memory that calls share.

Reference: Lavin & Gray, "Fast Algorithms for Convolutional Neural Networks", arXiv 1509.09308, section 4.1.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

_FILTER = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))  # G
_FORWARD = (0, 1, 2, 3)
_BACKWARD = (3, 1, 2, 0)  # of a mirrored filter, G g is that of the filter with its outer rows exchanged


class Workspace:
    """Memory that calls take turns in: for so much of it, getting it from the system costs as much as the sums."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def take(self, name: str, like: Tensor, *shape: int) -> Tensor:
        """What is called `name`, as a tensor of `shape` with anything in it, valid until it is taken again."""
        held, size = self._held.get(name), prod(shape)
        if held is None or held.numel() < size or held.dtype != like.dtype:
            with torch.inference_mode(False):
                held = self._held[name] = torch.empty(size, dtype=like.dtype, device=like.device)
        return held[:size].view(shape)


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, workspace: Workspace) -> Tensor:
    """`conv2d(x, weight, bias, padding=1)` of x (b, c, h, w), h and w even, with a frozen weight (k, c, 3, 3).

    Gradients flow to x alone.  ValueError for odd sides and for filters of another size.
    """
    if x.shape[-2] % 2 or x.shape[-1] % 2 or weight.shape[-2:] != (3, 3):
        raise ValueError(f"expected even sides and 3×3 filters, got {tuple(x.shape)} and {tuple(weight.shape)}")
    return _Convolution.apply(x, weight, bias, workspace)  # pyright: ignore[reportReturnType]


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, workspace: Workspace) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.workspace = workspace
        return _pixels(_tiles(x, _FORWARD, workspace), _filters(weight, workspace), bias, _FORWARD, workspace)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (weight,), workspace = ctx.saved_tensors, ctx.workspace
        tiles, filters = _tiles(gradients[0], _BACKWARD, workspace), _filters(weight, workspace).mT
        return _pixels(tiles, filters, None, _BACKWARD, workspace), None, None, None


def _filters(weight: Tensor, workspace: Workspace) -> Tensor:
    """G g Gᵀ of filters (k, c, 3, 3), as (16, k, c)."""
    k, c, g = *weight.shape[:2], weight.new_tensor(_FILTER)
    filters = workspace.take("filters", weight, 16, k * c)
    return torch.mm(torch.kron(g, g), weight.reshape(-1, 9).T, out=filters).view(16, k, c)


def _tiles(x: Tensor, order: tuple[int, ...], workspace: Workspace) -> Tensor:
    """Bᵀ d B of the tiles of x (b, c, h, w), as (4, 4, c, b, h/2, w/2), its rows and columns put where `order` says."""
    b, c, h, w = x.shape
    rows = pad(x, (1, 1, 1, 1)).transpose(0, 1)
    half = workspace.take("half", x, 4, c, b, h // 2, w + 2)
    _differences([rows[..., i : h + i : 2, :] for i in range(4)], [half[i] for i in order])
    tiles = workspace.take("tiles", x, 4, 4, c, b, h // 2, w // 2)
    _differences([half[..., i : w + i : 2] for i in range(4)], [tiles[:, i] for i in order])
    return tiles


def _differences(d: list[Tensor], out: list[Tensor]) -> None:
    """Bᵀ d = (d₀ − d₂, d₁ + d₂, d₂ − d₁, d₁ − d₃), into `out`."""
    torch.sub(d[0], d[2], out=out[0])
    torch.add(d[1], d[2], out=out[1])
    torch.sub(d[2], d[1], out=out[2])
    torch.sub(d[1], d[3], out=out[3])


def _pixels(
    tiles: Tensor, filters: Tensor, bias: Tensor | None, order: tuple[int, ...], workspace: Workspace
) -> Tensor:
    """Aᵀ m A of m = filters (16, k, c) · tiles, as (b, k, h, w)."""
    _, _, _, b, h, w = tiles.shape
    products = workspace.take("products", tiles, 16, filters.shape[1], b * h * w)
    products = torch.bmm(filters, tiles.view(16, -1, b * h * w), out=products).view(4, 4, -1, b, h, w)
    if bias is not None:
        products[1, 1].add_(bias[:, None, None, None])  # Aᵀ m A adds this product, unsigned, to all four pixels
    y = tiles.new_empty(b, products.shape[2], h, 2, w, 2)
    pixels = y.transpose(0, 1)
    for row, sums in enumerate(_sums([products[i] for i in order])):
        for column, values in enumerate(_sums([sums[i] for i in order])):
            pixels[:, :, :, row, :, column] = values
    return y.view(b, -1, 2 * h, 2 * w)


def _sums(m: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Aᵀ m = (m₀ + m₁ + m₂, m₁ − m₂ − m₃)."""
    return (m[0] + m[1]).add_(m[2]), (m[1] - m[2]).sub_(m[3])
