"""Uniform attention maps: a photo's trajectory on which the text says the same everywhere, and what is taken from it.

    A = (1/N) Σ_j V_j        at every position, in every text attention, at every step

Inverted and sampled so, under the empty prompt, a photo comes back nearly as it was.  During an edit, wherever source
and target agree about the clean picture, the target takes that auxiliary picture instead:

    E = maxpool₃ 1[ |x̂0_src − x̂0_tgt| > 2 λ ],   λ the q·i/(S−1) quantile of |x̂0_src − x̂0_tgt|,   0 < t < T_mask
    x̂0_tgt ← (1 − E) x̂0_u + E x̂0_tgt            ε̂ stays

References: Mo et al., "Uniform Attention Maps: Boosting Image Fidelity in Reconstruction and Editing", arXiv
2411.19652.  Where the paper's box and its code differ, this follows the code: the threshold is doubled, the edited side
is dilated, and the quantile grows with the step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

from personalize.attention import AttentionHook, AttentionSite
from personalize.errors import UserError
from personalize.model import StableDiffusion
from personalize.moves import Schedule, Step
from personalize.sampling import Edit, LatentEdit, denoise, denoise_with_history

AUXILIARIES = ("u", "stored", "z0")
REDUCTIONS = (None, "any", "mean")
FLOOR = 1e-3  # of |Δ|, in latents of about unit size: less is no edit, whatever its quantile


class UniformMaps(AttentionHook):
    """Every text token weighs 1/N, at every text attention: its output is one vector, the mean value, everywhere.

    N is the number of tokens given, padding included.  One key is left, so that the softmax is 1 and costs nothing.
    """

    def wants(self, site: AttentionSite) -> bool:
        return site.cross

    def qkv(self, q: Tensor, k: Tensor, v: Tensor, site: AttentionSite) -> tuple[Tensor, Tensor, Tensor]:
        return q, k[:, :, :1], v.float().mean(2, keepdim=True).to(v.dtype)


@dataclass(frozen=True)
class UniformSettings:
    """How the auxiliary picture is blended in.

    Args:
        until: T_mask as a share of the schedule: steps of 0 < t < until · 1000 are blended.
        quantile: q, reached at the last step; lower values keep less.
        threshold_scale: how many λ a difference must exceed to be an edit.  1 would call nearly everything an edit.
        dilate: radius of the dilation of the edited side, in latent cells.
        blend_source: give the source's x̂0 the auxiliary picture where the target is edited, as for mutual attention.
        auxiliary: "u", sampled from its own inversion; "stored", sampled from its inversion at T_mask only; "z0", the
            encoded photo itself, which is blended latent diffusion: the control.
        reduce: one mask for all latent channels, where "any" or the "mean" of them says edit; None: each its own.
    """

    until: float = 0.2
    quantile: float = 0.5
    threshold_scale: float = 2.0
    dilate: int = 1
    blend_source: bool = False
    auxiliary: str = "u"
    reduce: str | None = None

    def __post_init__(self) -> None:
        if self.auxiliary not in AUXILIARIES or self.reduce not in REDUCTIONS:
            raise UserError(f"auxiliary is one of {AUXILIARIES} and reduce one of {REDUCTIONS}; got {self}")
        if not 0 <= self.until <= 1 or not 0 <= self.quantile <= 1:
            raise UserError(f"until and quantile are shares from 0 to 1, got {self.until} and {self.quantile}")

    def blends(self, step: Step) -> bool:
        return 0 < step.start < self.until * 1000

    def quantile_at(self, step: Step) -> float:
        """q·i/(S−1)."""
        return self.quantile * step.index / max(1, step.count - 1)


def edit_mask(
    difference: Tensor, quantile: float, *, threshold_scale: float = 2.0, dilate: int = 1, reduce: str | None = None
) -> Tensor:
    """Boolean (b, c, h, w), True where `difference` (b, c, h, w) is an edit: |Δ| > threshold_scale · λ, then dilated.

    λ is the quantile of |Δ| over all values of a row.
    """
    size = difference.abs()
    level = size.flatten(1).quantile(quantile, 1).view(-1, 1, 1, 1)
    edited = (size > threshold_scale * level) & (size > FLOOR)
    if reduce is not None:
        share = edited.float().mean(1, keepdim=True)
        edited = (share > (0 if reduce == "any" else 0.5)).expand_as(edited)
    return max_pool2d(edited.float(), 2 * dilate + 1, stride=1, padding=dilate) > 0


class UniformBlend(LatentEdit):
    """Gives target rows the auxiliary x̂0 where they agree with row 0, the source; keeps the masks, for display.

    Args:
        clean: x̂0_u (1, c, h, w) of each blended step, by the step's timestep.
        mask: the user's own, (h, w), True where edits may happen; it takes the place of the adaptive one.
    """

    def __init__(self, clean: Mapping[float, Tensor], settings: UniformSettings, mask: Tensor | None = None) -> None:
        self.auxiliary, self.settings, self.mask = clean, settings, mask
        self.masks: dict[float, Tensor] = {}

    def clean(self, x0: Tensor, step: Step) -> Tensor:
        if not self.settings.blends(step):
            return x0
        source, targets = x0[:1], x0[1:]
        edited = self._edited(source - targets, step)
        self.masks[step.start] = edited.cpu()
        theirs = self.auxiliary[step.start].to(x0)
        blended = torch.where(edited, targets, theirs)
        if self.settings.blend_source:
            source = torch.where(edited[:1], theirs, source)
        return torch.cat([source, blended])

    def _edited(self, difference: Tensor, step: Step) -> Tensor:
        if self.mask is not None:
            return self.mask.to(difference.device).expand_as(difference)
        return edit_mask(
            difference, self.settings.quantile_at(step), threshold_scale=self.settings.threshold_scale,
            dilate=self.settings.dilate, reduce=self.settings.reduce,
        )  # fmt: skip

    def edited_region(self) -> Tensor:
        """Boolean (h, w): where any channel of the first target was edited at any blended step."""
        if not self.masks:
            raise ValueError("no step was blended: raise `until` or the number of steps")
        return torch.stack([mask[0].any(0) for mask in self.masks.values()]).any(0)


def uniform_edit(model: StableDiffusion, size: tuple[int, int]) -> Edit:
    """What the auxiliary trajectory is told: nothing, uniformly, without guidance.  `size` (H, W) in pixels."""
    with torch.no_grad():
        nothing = model.prompts([""], size)
    return Edit(nothing, guidance_scale=1.0, hooks=(UniformMaps(),))


def reconstruct(model: StableDiffusion, clean: Tensor, up: Schedule, down: Schedule) -> Tensor:
    """`clean` latents (1, c, h, w) inverted by `up` and sampled back by `down`, both with uniform maps."""
    edit = uniform_edit(model, _pixels(model, clean))
    return denoise(model, denoise(model, clean, edit, up), edit, down)


def auxiliary_estimates(
    model: StableDiffusion, clean: Tensor, up: Schedule, down: Schedule, settings: UniformSettings
) -> dict[float, Tensor]:
    """x̂0_u (1, c, h, w) of every step of `down` that is blended, by timestep; `up` inverts what `down` samples.

    "u" costs a prediction for each move of both, "stored" one for each move below T_mask, "z0" none.
    """
    numbers = [i for i, move in enumerate(down) if settings.blends(Step(**vars(move), index=i, count=len(down)))]
    starts = {number: down.steps[number].start for number in numbers}
    if settings.auxiliary == "z0" or not numbers:
        return dict.fromkeys(starts.values(), clean)
    edit = uniform_edit(model, _pixels(model, clean))
    first = numbers[0] if settings.auxiliary == "stored" else 0
    start = denoise(model, clean, edit, replace(up, steps=up.steps[: len(up) - first]))
    found = denoise_with_history(model, start, edit, down[first:]).clean
    return {starts[number]: found[number - first] for number in numbers}


def _pixels(model: StableDiffusion, latents: Tensor) -> tuple[int, int]:
    height, width = latents.shape[-2:]
    return int(height) * model.factor, int(width) * model.factor
