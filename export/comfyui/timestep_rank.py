"""Timestep-dependent rank: at each step only the components of a LoRA that were trained at its noise level take part.

Reference: Soboleva et al., "T-LoRA: Single Image Diffusion Model Customization Without Overfitting", arXiv 2507.05964.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

LARGEST = 10**4  # exponent, and number of timesteps: larger ones make a power, or a table, that never ends


class TimestepMask:
    """Which of a LoRA's rank components take part in a forward pass of the UNet: the first r(t).

        r(t) = ⌊ ((T − t) / T)^α · (r − r_min) ⌋ + r_min

    It wraps the UNet's forward pass, where it reads t.  A rank that is a multiple n of r has n such groups.
    """

    def __init__(self, rule: dict[str, Any], rank: int) -> None:
        full, least = int(rule["rank"]), int(rule["min_rank"])
        if rank % full:
            raise ValueError(f"the LoRA has rank {rank}, its timestep-dependent rank is for {full}: files are mixed up")
        last, alpha = int(rule["timesteps"]), float(rule["alpha"])
        if not 0 < alpha <= LARGEST or not 1 <= last <= LARGEST:
            raise ValueError(
                f"the timestep-dependent rank has exponent {alpha} and {last} timesteps: both go to {LARGEST}"
            )
        if alpha.is_integer():  # exact: a product such as 0.29 · 100 would be rounded to below 29
            counts = [(last - t) ** int(alpha) * (full - least) // last ** int(alpha) for t in range(last + 1)]
        else:
            counts = [int(((last - t) / last) ** alpha * (full - least) + 1e-9) for t in range(last + 1)]
        active = torch.tensor(counts)[:, None] + least
        self.table = (torch.arange(full) < active).float().repeat(1, rank // full)  # (T + 1, rank)
        self.rows: Tensor | None = None

    def __call__(
        self, executor: Callable[..., Tensor], x: Tensor, timesteps: Tensor, *args: Any, **more: Any
    ) -> Tensor:
        before, self.table = self.rows, self.table.to(x.device)
        self.rows = self.table[timesteps.reshape(-1).round().long().clamp(0, len(self.table) - 1)]
        try:
            return executor(x, timesteps, *args, **more)
        finally:
            self.rows = before

    def of(self, u: Tensor, channel: int) -> Tensor:
        """The mask for u, whose components lie along `channel`: a row for each sample, or one for all."""
        if self.rows is None:
            raise RuntimeError("a LoRA of timestep-dependent rank was called outside of the UNet's forward pass")
        rows = self.rows if len(self.rows) == len(u) else self.rows[:1]
        shape = [len(rows)] + [1] * (u.ndim - 1)
        shape[channel] = rows.shape[1]
        return rows.to(u.dtype).view(shape)


class MaskedLora:
    """scale · B (m(t) ⊙ A x) for a linear layer or a convolution."""

    def __init__(self, layer: Any, down: Tensor, up: Tensor, scale: float, mask: TimestepMask) -> None:
        self.layer, self.down, self.up, self.scale, self.mask = layer, down, up, scale, mask

    def __call__(self, x: Tensor) -> Tensor:
        self.down, self.up = self.down.to(x), self.up.to(x)  # moved once
        if self.down.ndim == 2:
            u = functional.linear(x, self.down)
            return functional.linear(u * self.mask.of(u, -1), self.up) * self.scale
        u = functional.conv2d(x, self.down, None, self.layer.stride, self.layer.padding)
        return functional.conv2d(u * self.mask.of(u, 1), self.up) * self.scale

    def added_to(self, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The layer's `forward` with this LoRA beside it."""
        return lambda x, *args, **more: forward(x, *args, **more) + self(x)
