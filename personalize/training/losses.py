"""Loss functions of tensors, and the form that a trainer's objective has.

Pure: torch alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from personalize.models.map_filters import normalised, smoothed


@dataclass(frozen=True)
class LossTerms:
    """The result of an objective: the scalar to minimise, and its detached parts by name, for the log."""

    total: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)


class Objective(nn.Module):
    """A training method as a module: it owns every parameter that is trained, and `forward(batch)` is the loss.

    `forward` returns `LossTerms`.  Accelerate prepares exactly this module.
    """

    def adapter_parameters(self) -> list[nn.Parameter]:
        """The parameters of the adapter, A before B of each LoRA layer."""
        raise NotImplementedError

    def trainable(self) -> dict[str, nn.Parameter]:
        """Every parameter that is trained, by name."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def resumable(self) -> dict[str, Tensor]:
        """What a checkpoint must hold: every trained parameter, and the frozen copies of an orthogonal start.

        The copies could be drawn again, but not to the bit on another machine.
        """
        starts = {name: buffer for name, buffer in self.named_buffers() if ".parametrizations." in name}
        return {**self.trainable(), **starts}


def masked_mse(output: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error of each sample, weighted by a mask:  Σ m (y − f)² / (c Σ m), shape (b,), in fp32.

    A sample whose mask is 0 everywhere has the error 0.

    Args:
        output, target: prediction f and target y, (b, c, h, w).
        mask: weights m (b, 1, h, w) in [0, 1].
    """
    squares = (output.float() - target.float()).pow(2)
    weight = mask.sum((1, 2, 3)).clamp(min=1e-8)  # far below the smallest sum of a mask that is not 0 everywhere
    return (mask * squares).sum((1, 2, 3)) / (weight * squares.shape[1])


def min_snr_weight(alphas_cumprod: Tensor, timesteps: Tensor, gamma: float, prediction_type: str = "epsilon") -> Tensor:
    """Weight of each sample's squared error under min-SNR-γ, shape (b,).

        w(t) = min(SNR(t), γ) / SNR(t)          for a prediction of ε; 1 where SNR = 0
        w(t) = min(SNR(t), γ) / (SNR(t) + 1)    for a prediction of v,       SNR = ᾱ / (1 − ᾱ)

    Args:
        alphas_cumprod: ᾱ of every training timestep, shape (1000,).
        timesteps: integers in [0, 1000), shape (b,).
        gamma: where the weight is cut off; the paper uses 5.

    References: Hang et al., "Efficient Diffusion Training via Min-SNR Weighting Strategy", arXiv 2303.09556, eq. 7.
    """
    alpha = alphas_cumprod.to(timesteps.device)[timesteps]
    snr = alpha / (1 - alpha)
    if prediction_type == "epsilon":
        return (gamma / snr).clamp(max=1)  # not 0 / 0 at ᾱ = 0, which a schedule rescaled to zero SNR has
    return torch.minimum(snr, torch.full_like(snr, gamma)) / (snr + 1)


def debiased_weight(alphas_cumprod: Tensor, timesteps: Tensor) -> Tensor:
    """Weight of each sample's squared error that keeps every timestep from vanishing, shape (b,):  w(t) = 1 / √SNR(t).

    For a prediction of ε.  The arguments are those of `min_snr_weight`.

    References: Yu et al., "Debias the Training of Diffusion Models", arXiv 2310.08442, §3.3.
    """
    alpha = alphas_cumprod.to(timesteps.device)[timesteps]
    return ((1 - alpha) / alpha).sqrt()


def grounding(maps: Tensor, masks: Tensor) -> Tensor:
    """How much of each text token's attention falls outside its object, shape (b, k), 0 (none) to 1 (all).

        L = (1 − Σ_u A(u) M(u) / Σ_u A(u))²

    Args:
        maps: attention A of k tokens, (b, k, h, w), not negative.
        masks: part of each cell that the token's object covers, M (b, k, h, w) in [0, 1].

    References: Wang et al., "TokenCompose: Grounding Diffusion with Token-level Supervision", arXiv 2312.03626, §3.2.
    """
    inside = (maps * masks).sum((-2, -1)) / maps.sum((-2, -1)).clamp_min(1e-8)
    return (1 - inside).square()


def soft_iou(a: Tensor, b: Tensor) -> Tensor:
    """Overlap of maps (…, h, w) in [0, 1]:  (Σ ab + 1) / (Σ (a + b − ab) + 1), shape (…); 1 if both are empty."""
    both = (a * b).sum((-2, -1))
    return (both + 1) / ((a + b).sum((-2, -1)) - both + 1)


def binding(class_maps: Tensor, modifier_maps: Tensor) -> Tensor:
    """How far each modifier token's attention map is from that of its class, (s,):  1 − IoU(stopgrad(Cᵢ), Mᵢ).

        C = (G ∗ Ā)²  of the class,  M = G ∗ Ā  of the modifier,  Ā the map scaled to [0, 1],  G a 3×3 Gaussian

    The loss is not 0 for equal maps (for a box of 8×5 cells it is 0.37): C is squared, to suppress weak attention, and
    M is not.

    Args:
        class_maps, modifier_maps: attention averaged over heads and layers, (s, h, w), of s concepts; any affine
            change of a map changes nothing.

    References: Zhang et al., "Attention Calibration for Disentangled Text-to-Image Personalization", arXiv 2403.18551,
    §3.3; soft IoU, filter and scaling as in the released code.
    """
    return 1 - soft_iou(_class_map(class_maps).detach(), smoothed(normalised(modifier_maps)))


def separation(class_maps: Tensor) -> Tensor:
    """Mean overlap of pairs of classes, a scalar:  mean over i < j of IoU(Cᵢ, Cⱼ);  0 for a single concept.

    C as in `binding`.  For two classes it is never 0: without overlap it is 1 / (1 + ΣCᵢ + ΣCⱼ), whose gradient goes on
    strengthening both maps.  The paper (eq. 6) sums the pairs, its code takes their mean; for two concepts they agree.
    """
    maps = _class_map(class_maps)
    first, second = torch.triu_indices(len(maps), len(maps), 1, device=maps.device)
    if len(first) == 0:
        return maps.sum() * 0
    return soft_iou(maps[first], maps[second]).mean()


def calibration(class_maps: Tensor, modifier_maps: Tensor) -> Tensor:
    """The attention calibration loss of one sample, a scalar:  Σᵢ binding + separation.

    It does not tie maps to places in the picture: maps that change places, or move off their objects together, cost
    nothing; see `anchoring`.
    """
    return binding(class_maps, modifier_maps).sum() + separation(class_maps)


def anchoring(maps: Tensor, masks: Tensor) -> Tensor:
    """How far each map (s, h, w) is from its object's mask (s, h, w) in [0, 1]:  1 − IoU(M, mask), shape (s,)."""
    return 1 - soft_iou(smoothed(normalised(maps)), masks.to(maps.device, torch.promote_types(maps.dtype, torch.float)))


def _class_map(maps: Tensor) -> Tensor:
    """C of `binding`: weak attention suppressed by squaring."""
    return smoothed(normalised(maps)).square()
