"""A weight rounded to the numbers that a quantized base can hold, as float32: float8, NF4 or int8.

    fp8    float8_e4m3fn without a scale, as graphical programs store a base
    nf4    blocks of 64 numbers, each divided by its largest absolute value, then one of the 16 levels of NF4
    int8   each row (an output) divided by its largest absolute value, then one of 255 whole numbers, as LLM.int8()

Pure: torch alone.

References: Dettmers et al., "QLoRA", arXiv 2305.14314 (NF4); Dettmers et al., "LLM.int8()", arXiv 2208.07339.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

BLOCK = 64  # numbers that share a scale in NF4
NF4 = (  # quantiles of a normal distribution, from bitsandbytes
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def fp8(weight: Tensor) -> Tensor:
    """The nearest numbers of float8_e4m3fn; what is larger than the largest, 448, becomes that."""
    largest = torch.finfo(torch.float8_e4m3fn).max
    return weight.float().clamp(-largest, largest).to(torch.float8_e4m3fn).float()


def nf4(weight: Tensor) -> Tensor:
    """The nearest levels of NF4, in blocks of 64 numbers in the order in which the weight is stored."""
    numbers = weight.float().flatten()
    padded = torch.cat([numbers, numbers.new_zeros(-len(numbers) % BLOCK)]).view(-1, BLOCK)
    scale = padded.abs().amax(1, keepdim=True).clamp_min(1e-30)
    levels = torch.tensor(NF4, device=weight.device)
    nearest = torch.bucketize(padded / scale, (levels[1:] + levels[:-1]) / 2)
    return (levels[nearest] * scale).flatten()[: len(numbers)].view_as(weight)


def int8(weight: Tensor) -> Tensor:
    """The nearest of 255 equal steps between minus and plus the largest absolute value of each row."""
    rows = weight.float().flatten(1)
    step = rows.abs().amax(1, keepdim=True).clamp_min(1e-30) / 127
    return ((rows / step).round() * step).view_as(weight)


ROUNDINGS: dict[str, Callable[[Tensor], Tensor]] = {"fp8": fp8, "nf4": nf4, "int8": int8}
LINEAR_ALONE = {"nf4", "int8"}  # bitsandbytes has no quantized convolution: there they stay as they are
