"""Which rank components of LoRA layers take part in a forward pass.

Pure: torch alone.
"""

from __future__ import annotations

from torch import Tensor


class RankMask:
    """Which rank components of a UNet's LoRA layers take part in the present forward pass: `value` m (b, R), or (1, R).

    All layers share one; `name` tells the rule.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.value: Tensor | None = None  # before the first forward pass

    def apply(self, u: Tensor, *, channels_first: bool = False) -> Tensor:
        """m ⊙ u for u (b, …, R), or (b, R, h, w)."""
        if self.value is None:
            return u
        return masked_components(u, self.value, channels_first=channels_first)


def masked_components(u: Tensor, mask: Tensor, *, channels_first: bool = False) -> Tensor:
    """m ⊙ u for u (b·l, R) or (b, …, R), or (b, R, h, w) with `channels_first`, and m (b, R) or (1, R)."""
    mask = mask.to(u.dtype)
    if channels_first:
        return u * mask[:, :, None, None]
    return (u.reshape(len(mask), -1, u.shape[-1]) * mask[:, None]).view(u.shape)
