"""Losses: small pure functions of tensors."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

TAPS = (0.21194155761708544, 0.5761168847658291, 0.21194155761708544)  # e⁻¹ : 1 : e⁻¹, a Gaussian of σ = 0.7071 cells


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


def debiased_weight(alphas_cumprod: Tensor, timesteps: Tensor) -> Tensor:
    """Weight of each sample's squared error of ε that lets every timestep count, shape (b,):  w(t) = 1 / √SNR(t).

    Args as in `min_snr_weight`.

    References: Yu et al., "Debias the Training of Diffusion Models", arXiv 2310.08442, §3.3.
    """
    alpha = alphas_cumprod.to(timesteps.device)[timesteps]
    return ((1 - alpha) / alpha).sqrt()


def grounding(maps: Tensor, masks: Tensor) -> Tensor:
    """How much of each text token's attention falls outside its thing, shape (b, k), 0 (none) to 1 (all).

        L = (1 − Σ_u A(u) M(u) / Σ_u A(u))²

    Args:
        maps: attention A of k tokens, (b, k, h, w), not negative.
        masks: share of each cell that the token's thing covers, M (b, k, h, w) in [0, 1].

    References: Wang et al., "TokenCompose: Grounding Diffusion with Token-level Supervision", arXiv 2312.03626, §3.2.
    """
    inside = (maps * masks).sum((-2, -1)) / maps.sum((-2, -1)).clamp_min(1e-8)
    return (1 - inside).square()


def normalised(maps: Tensor) -> Tensor:
    """Each map (…, h, w) stretched to [0, 1]:  (a − min a) / (max a − min a + 10⁻⁸), in fp32 at least.

    In half precision 10⁻⁸ would be zero, and a constant map no number.
    """
    maps = maps if maps.dtype == torch.float64 else maps.float()
    low, high = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
    return (maps - low) / (high - low + 1e-8)


def smoothed(maps: Tensor, taps: tuple[float, float, float] = TAPS) -> Tensor:
    """Maps (s, h, w) filtered 3×3 with `taps` along both sides, borders reflected; no stretching afterwards.

    The published kernel is named σ = 0.5 but computes exp(−(x / 2σ)²): its neighbours weigh e⁻¹, not e⁻².
    """
    row = torch.tensor(taps, dtype=maps.dtype, device=maps.device)
    return conv2d(pad(maps[:, None], (1, 1, 1, 1), mode="reflect"), torch.outer(row, row)[None, None])[:, 0]


def soft_iou(a: Tensor, b: Tensor) -> Tensor:
    """Overlap of maps (…, h, w) in [0, 1]:  (Σ ab + 1) / (Σ (a + b − ab) + 1), shape (…); 1 if both are empty."""
    both = (a * b).sum((-2, -1))
    return (both + 1) / ((a + b).sum((-2, -1)) - both + 1)


def binding(class_maps: Tensor, modifier_maps: Tensor) -> Tensor:
    """How far each modifier's map is from its class's, (s,):  1 − IoU(stopgrad(Cᵢ), Mᵢ).

        C = (G ∗ Ā)²  of the class,  M = G ∗ Ā  of the modifier,  Ā the map stretched to [0, 1],  G a 3×3 Gaussian

    Not zero at equal maps: a box of 8×5 cells has 0.37, for C is squared (weak attention suppressed) and M is not.

    Args:
        class_maps, modifier_maps: attention averaged over heads and layers, (s, h, w), of s concepts; any affine
            change of a map changes nothing.

    References: Zhang et al., "Attention Calibration for Disentangled Text-to-Image Personalization", arXiv 2403.18551,
    §3.3; soft IoU, filter and stretching as in the released code.
    """
    return 1 - soft_iou(_suppressed(class_maps).detach(), smoothed(normalised(modifier_maps)))


def separation(class_maps: Tensor) -> Tensor:
    """Mean overlap of pairs of classes, a scalar:  mean over i < j of IoU(Cᵢ, Cⱼ);  0 for a single concept.

    C as in `binding`.  Never 0 for two: with no overlap it is 1 / (1 + ΣCᵢ + ΣCⱼ), which goes on strengthening both.
    The paper (eq. 6) sums the pairs, its code takes their mean; they are the same for two concepts.
    """
    maps = _suppressed(class_maps)
    first, second = torch.triu_indices(len(maps), len(maps), 1, device=maps.device)
    if len(first) == 0:
        return maps.sum() * 0
    return soft_iou(maps[first], maps[second]).mean()


def calibration(class_maps: Tensor, modifier_maps: Tensor) -> Tensor:
    """The attention loss of one sample, a scalar:  Σᵢ binding + separation.

    It has no anchor: maps that change places or slide off their objects together cost nothing; see `anchoring`.
    """
    return binding(class_maps, modifier_maps).sum() + separation(class_maps)


def anchoring(maps: Tensor, masks: Tensor) -> Tensor:
    """How far each map (s, h, w) is from its true mask (s, h, w) in [0, 1]:  1 − IoU(M, mask), (s,)."""
    return 1 - soft_iou(smoothed(normalised(maps)), masks.to(maps.device, torch.promote_types(maps.dtype, torch.float)))


def _suppressed(maps: Tensor) -> Tensor:
    return smoothed(normalised(maps)).square()
