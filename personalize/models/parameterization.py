"""What a UNet's output means: the noise ε or the velocity v, and how to get clean latents and noise from either.

    z_t = √ᾱ x0 + √(1−ᾱ) ε        v = √ᾱ ε − √(1−ᾱ) x0

Latents are (b, c, h, w); ᾱ in (0, 1] is a number or broadcasts against them.

Pure: torch alone.

References: Ho et al., arXiv 2006.11239, eq. 4; Salimans and Ho, arXiv 2202.00512, appendix D.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from personalize.errors import UserError


class Parameterization(Protocol):
    """What a base model predicts, as three conversions; a further kind is a further class and an entry below."""

    def target(self, x0: Tensor, noise: Tensor, alpha: Tensor) -> Tensor:
        """What the UNet should return for z_t made of `x0` and `noise`."""
        ...

    def split(self, output: Tensor, z_t: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """Estimates (x0, ε) from the UNet's output for `z_t`."""
        ...

    def output(self, x0: Tensor, z_t: Tensor, alpha: Tensor) -> Tensor:
        """The UNet output for `z_t` whose clean estimate is `x0`: the inverse of `split` (ᾱ < 1)."""
        ...


class Epsilon:
    """The UNet predicts the noise ε:  x0 = (z_t − √(1−ᾱ) ε) / √ᾱ."""

    def target(self, x0: Tensor, noise: Tensor, alpha: Tensor) -> Tensor:
        return noise

    def split(self, output: Tensor, z_t: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
        return (z_t - (1 - alpha).sqrt() * output) / alpha.sqrt(), output

    def output(self, x0: Tensor, z_t: Tensor, alpha: Tensor) -> Tensor:
        return (z_t - alpha.sqrt() * x0) / (1 - alpha).sqrt()


class Velocity:
    """The UNet predicts v:  x0 = √ᾱ z_t − √(1−ᾱ) v,  ε = √ᾱ v + √(1−ᾱ) z_t."""

    def target(self, x0: Tensor, noise: Tensor, alpha: Tensor) -> Tensor:
        return alpha.sqrt() * noise - (1 - alpha).sqrt() * x0

    def split(self, output: Tensor, z_t: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
        signal, sigma = alpha.sqrt(), (1 - alpha).sqrt()
        return signal * z_t - sigma * output, signal * output + sigma * z_t

    def output(self, x0: Tensor, z_t: Tensor, alpha: Tensor) -> Tensor:
        return (alpha.sqrt() * z_t - x0) / (1 - alpha).sqrt()


PARAMETERIZATIONS: dict[str, Parameterization] = {"epsilon": Epsilon(), "v_prediction": Velocity()}


def of(prediction_type: str) -> Parameterization:
    """The parameterization that a scheduler's `prediction_type` names; UserError for one that is not supported."""
    if prediction_type not in PARAMETERIZATIONS:
        raise UserError(f"the base predicts {prediction_type!r}; expected one of {', '.join(PARAMETERIZATIONS)}")
    return PARAMETERIZATIONS[prediction_type]


def noised(x0: Tensor, noise: Tensor, alpha: Tensor | float) -> Tensor:
    """z_t = √ᾱ x0 + √(1−ᾱ) ε."""
    return alpha**0.5 * x0 + (1 - alpha) ** 0.5 * noise


def as_alpha(alpha_bar: Tensor | float, like: Tensor) -> Tensor:
    """ᾱ as a tensor of the device and dtype of `like`."""
    if isinstance(alpha_bar, Tensor):
        return alpha_bar.to(like.device, like.dtype)
    return torch.full((), alpha_bar, dtype=like.dtype, device=like.device)  # no copy from the host
