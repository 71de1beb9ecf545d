"""Losses: small pure functions of tensors."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class LossTerms:
    """What an objective returns: the scalar to minimise, and named detached parts for the log."""

    total: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)


def min_snr_weight(alphas_cumprod: Tensor, timesteps: Tensor, gamma: float, prediction_type: str = "epsilon") -> Tensor:
    """Weight of each sample's squared error under min-SNR-γ, shape (b,).

        w(t) = min(SNR(t), γ) / SNR(t)          for a prediction of ε
        w(t) = min(SNR(t), γ) / (SNR(t) + 1)    for a prediction of v,       SNR = ᾱ / (1 − ᾱ)

    Args:
        alphas_cumprod: ᾱ of every training timestep, shape (1000,).
        timesteps: integers in [0, 1000), shape (b,).
        gamma: where the weight is cut off; the paper uses 5.

    References: Hang et al., "Efficient Diffusion Training via Min-SNR Weighting Strategy", arXiv 2303.09556, eq. 7.
    """
    alpha = alphas_cumprod.to(timesteps.device)[timesteps]
    snr = alpha / (1 - alpha)
    denominator = snr if prediction_type == "epsilon" else snr + 1
    return torch.minimum(snr, torch.full_like(snr, gamma)) / denominator
