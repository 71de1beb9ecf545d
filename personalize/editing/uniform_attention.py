"""Uniform attention maps: reconstruct a photo without the influence of words, and use that outside the edited region.

In the cross-attention layers every text token gets the same weight, at every position and every step:

    A = (1/N) Σ_j V_j

Inverted and sampled like this with the empty prompt, a photo is reconstructed almost exactly. This is the auxiliary
reconstruction, with estimates x̂0_u of the clean latents. Wherever the estimates of source and target agree during an
edit, the target takes the auxiliary estimate:

    E = maxpool₃ 1[ |x̂0_src − x̂0_tgt| > 2 λ ],   λ the q·i/(S−1) quantile of |x̂0_src − x̂0_tgt|,   0 < t < T_mask
    x̂0_tgt ← (1 − E) x̂0_u + E x̂0_tgt            ε̂ is not changed

References: Mo et al., "Uniform Attention Maps: Boosting Image Fidelity in Reconstruction and Editing", arXiv
2411.19652. Where the paper's algorithm and its code differ, this follows the code: the threshold is doubled, the edited
region is dilated, and the quantile grows with the step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

from personalize.editing.config import UniformSettings
from personalize.models.attention import AttentionHook, AttentionSite
from personalize.models.stable_diffusion import StableDiffusion
from personalize.models.transfer import sent
from personalize.sampling.denoise import Edit, LatentEdit, denoise, denoise_with_history
from personalize.sampling.schedule import Schedule, Step

MIN_DIFFERENCE = 1e-3  # a smaller |Δ|, in latents of about unit variance, is no edit, whatever its quantile


class UniformMaps(AttentionHook):
    """Makes every cross-attention layer return the mean of the values at every position, as if all weights were 1/N.

    N is the number of tokens, padding included. The hook keeps one key and the mean value, so that the softmax is 1.
    """

    def wants(self, site: AttentionSite) -> bool:
        return site.cross

    def qkv(self, q: Tensor, k: Tensor, v: Tensor, site: AttentionSite) -> tuple[Tensor, Tensor, Tensor]:
        return q, k[:, :, :1], v.float().mean(2, keepdim=True).to(v.dtype)


def edit_mask(
    difference: Tensor, quantile: float, *, threshold_scale: float = 2.0, dilate: int = 1, reduce: str | None = None
) -> Tensor:
    """The edited region, boolean (b, c, h, w): where |Δ| > threshold_scale · λ for Δ = `difference`, then dilated.

    λ is the quantile of |Δ| over all values of a row; the options are those of `UniformSettings`.
    """
    size = difference.abs()
    level = size.flatten(1).quantile(quantile, 1).view(-1, 1, 1, 1)
    edited = (size > threshold_scale * level) & (size > MIN_DIFFERENCE)
    if reduce is not None:
        share = edited.float().mean(1, keepdim=True)
        edited = (share > (0 if reduce == "any" else 0.5)).expand_as(edited)
    return max_pool2d(edited.float(), 2 * dilate + 1, stride=1, padding=dilate) > 0


class UniformBlend(LatentEdit):
    """Replaces x̂0 of the target rows by the auxiliary estimate where they agree with row 0, the source.

    `masks` keeps the edited region of each blended step, by timestep.

    Args:
        clean: x̂0_u (1, c, h, w) of each blended step, by timestep.
        mask: a region given by the user, boolean (h, w), True where the photo may change; it replaces the computed one.
    """

    def __init__(self, clean: Mapping[float, Tensor], settings: UniformSettings, mask: Tensor | None = None) -> None:
        self.auxiliary, self.settings, self.mask = clean, settings, mask
        self.masks: dict[float, Tensor] = {}

    def clean(self, x0: Tensor, step: Step) -> Tensor:
        if not self.settings.blends(step):
            return x0
        source, targets = x0[:1], x0[1:]
        edited = self._edited(source - targets, step)
        self.masks[step.start] = edited
        auxiliary = sent(self.auxiliary[step.start], x0.device).to(x0)
        blended = torch.where(edited, targets, auxiliary)
        if self.settings.blend_source:
            source = torch.where(edited.any(0, keepdim=True), auxiliary, source)
        return torch.cat([source, blended])

    def _edited(self, difference: Tensor, step: Step) -> Tensor:
        if self.mask is not None:
            self.mask = sent(self.mask, difference.device)
            return self.mask.expand_as(difference)
        return edit_mask(
            difference, self.settings.quantile_at(step), threshold_scale=self.settings.threshold_scale,
            dilate=self.settings.dilate, reduce=self.settings.reduce,
        )  # fmt: skip

    def edited_regions(self) -> Tensor:
        """Boolean (targets, h, w): where any channel of each target was edited at any blended step."""
        if not self.masks:
            raise ValueError("no step was blended: raise `until` or the number of steps")
        return torch.stack([mask.any(1) for mask in self.masks.values()]).any(0).cpu()


def uniform_edit(model: StableDiffusion, size: tuple[int, int]) -> Edit:
    """The edit of the auxiliary reconstruction: empty prompt, uniform maps, no guidance; `size` (H, W) in pixels."""
    with torch.no_grad():
        empty_prompt = model.prompts([""], size)
    return Edit(empty_prompt, guidance_scale=1.0, hooks=(UniformMaps(),))


def reconstruct(model: StableDiffusion, clean: Tensor, up: Schedule, down: Schedule) -> Tensor:
    """`clean` latents (1, c, h, w), inverted with schedule `up` and sampled with `down`, both with uniform maps."""
    edit = uniform_edit(model, _pixels(model, clean))
    return denoise(model, denoise(model, clean, edit, up), edit, down)


def auxiliary_estimates(
    model: StableDiffusion, clean: Tensor, up: Schedule, down: Schedule, settings: UniformSettings
) -> dict[float, Tensor]:
    """x̂0_u (1, c, h, w) of every blended step of schedule `down`, by timestep; `up` is the inverse schedule.

    `settings.auxiliary` decides the cost: "u" makes a UNet prediction for each step of both schedules, "stored" for
    each step of both below T_mask, "z0" none.
    """
    numbers = [i for i, one in enumerate(down) if settings.blends(one)]
    starts = {number: down.steps[number].start for number in numbers}
    if settings.auxiliary == "z0" or not numbers:
        return dict.fromkeys(starts.values(), clean)
    edit = uniform_edit(model, _pixels(model, clean))
    first = numbers[0] if settings.auxiliary == "stored" else 0
    start = denoise(model, clean, edit, replace(up, steps=up.steps[: len(up) - first]))
    estimates = denoise_with_history(model, start, edit, down[first:]).clean
    return {starts[number]: estimates[number - first] for number in numbers}


def _pixels(model: StableDiffusion, latents: Tensor) -> tuple[int, int]:
    height, width = latents.shape[-2:]
    return int(height) * model.factor, int(width) * model.factor
