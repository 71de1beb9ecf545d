"""Attention maps scaled to [0, 1] and smoothed.

Pure: torch alone.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

TAPS = (0.21194155761708544, 0.5761168847658291, 0.21194155761708544)  # e⁻¹ : 1 : e⁻¹, a Gaussian of σ = 0.7071 cells


def normalised(maps: Tensor) -> Tensor:
    """Each map (…, h, w) scaled to [0, 1]:  (a − min a) / (max a − min a + 10⁻⁸), computed in fp32 or better.

    In half precision 10⁻⁸ would round to zero, and a constant map would give NaN.
    """
    maps = maps if maps.dtype == torch.float64 else maps.float()
    low, high = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
    return (maps - low) / (high - low + 1e-8)


def smoothed(maps: Tensor, taps: tuple[float, float, float] = TAPS) -> Tensor:
    """Maps (s, h, w) filtered with the 3×3 kernel taps ⊗ taps, borders reflected; the result is not scaled to [0, 1].

    The default `taps` are those of the released code, whose kernel is named σ = 0.5 but computes exp(−(x / 2σ)²): the
    neighbours weigh e⁻¹, not e⁻².
    """
    padded = pad(maps[:, None], (1, 1, 1, 1), mode="reflect")
    return conv2d(padded, _kernel(taps, maps.dtype, maps.device))[:, 0]


@cache
def _kernel(taps: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """taps ⊗ taps, (1, 1, 3, 3)."""
    row = torch.tensor(taps, dtype=dtype, device=device)
    return torch.outer(row, row)[None, None]
