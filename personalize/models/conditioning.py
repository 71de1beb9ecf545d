"""What the UNet is conditioned on: the embeddings of prompts, and for SDXL pooled embeddings and sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from personalize.models.transfer import sent


@dataclass(frozen=True)
class Conditioning:
    """What the UNet is conditioned on: text `embeds` (b, l, d) and, for SDXL, `pooled` (b, e) and `time_ids` (b, 6)."""

    embeds: Tensor
    pooled: Tensor | None = None
    time_ids: Tensor | None = None

    def __len__(self) -> int:
        return len(self.embeds)

    def __getitem__(self, rows: slice | Tensor) -> Conditioning:
        return self._map(lambda tensor: tensor[rows])

    def repeat(self, count: int) -> Conditioning:
        """Every row `count` times in a row: a, a, b, b."""
        return self._map(lambda tensor: tensor.repeat_interleave(count, 0))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Conditioning:
        def moved(tensor: Tensor) -> Tensor:
            return (tensor if device is None else sent(tensor, device)).to(dtype=dtype)

        return self._map(moved)

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Concatenate rows; ValueError if the parts differ in tokens l, width d, or in having pooled embeddings."""
        shapes = {(part.embeds.shape[1:], part.pooled is None) for part in parts}
        if len(shapes) != 1:
            raise ValueError(f"conditionings to concatenate need one shape (l, d), got {sorted(map(str, shapes))}")
        rows = zip(*((part.embeds, part.pooled, part.time_ids) for part in parts), strict=True)
        return Conditioning(*(None if column[0] is None else torch.cat(column) for column in rows))  # pyright: ignore

    def _map(self, function: Any) -> Conditioning:
        rest = (tensor if tensor is None else function(tensor) for tensor in (self.pooled, self.time_ids))
        return Conditioning(function(self.embeds), *rest)


def of_one_length(parts: Sequence[Conditioning]) -> list[Conditioning]:
    """`parts` with equally many tokens: each is repeated along l up to their least common multiple, as in ComfyUI.

    Attention to every token r times is attention to it once, so that no part comes to mean anything else:

        softmax(Q [K … K]ᵀ) [V … V] = softmax(Q Kᵀ) V
    """
    length = math.lcm(*(part.embeds.shape[1] for part in parts))
    times = [length // part.embeds.shape[1] for part in parts]
    return [
        part if count == 1 else replace(part, embeds=part.embeds.repeat(1, count, 1))
        for part, count in zip(parts, times, strict=True)
    ]
