"""Null-text inversion: a null embedding for each step, fitted so that guided sampling follows the trajectory.

    L(U) = mean (z*_{t′} − DDIM(z̄_t, ε_U + w (ε_C − ε_U)))²          U (1, l, d), Adam, a few updates a step

References: Mokady et al., "Null-text Inversion for Editing Real Images", arXiv 2211.09794, eq. 3 and algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from personalize.errors import UserError
from personalize.model import Conditioning, StableDiffusion
from personalize.moves import Step
from personalize.sampling import Condition, ddim

HALF_SCALE = 2.0**12  # of the loss in half precision, whose gradients would be rounded to nothing


@dataclass(frozen=True)
class NullText:
    """How null embeddings are fitted.  UserError for a value out of its range."""

    iterations: int = 10
    """Updates at each step at most."""
    rate: float = 1e-2
    """Learning rate of the first step; it falls as 1 − i/(2T) over the steps i of T."""
    tolerance: float = 1e-5
    """A step is left as soon as its loss is below this …"""
    growth: float = 2e-5
    """… plus this for every step before it, where there are 50; 0 keeps all steps equally exact."""
    warm_start: bool = True
    """Start each step from the embedding the last one found, and not from the empty prompt."""

    def __post_init__(self) -> None:
        if self.iterations < 1 or self.rate <= 0 or self.tolerance < 0 or self.growth < 0:
            raise UserError(f"null-text takes iterations from 1, a positive rate and no negative tolerance, got {self}")


NULL_TEXT = NullText()


class NullFit:
    """Fits while `denoise` runs: its `negative`.  `rows` holds what was found, `losses` each step's, first to last.

    A step returns the best embedding it has seen, so that none ends worse than it began.  Nothing of the model learns.

    Args:
        pivots: the trajectory (t+1, 1, c, h, w), clean latents first.
        told: the source's conditioning, or a function of step and latents.
        null: where the first step starts, one row.
        guidance_scale: w of the sampling that is to follow the trajectory.
    """

    def __init__(
        self, model: StableDiffusion, pivots: Tensor, told: Conditioning | Condition, null: Conditioning,
        guidance_scale: float, settings: NullText,
    ) -> None:  # fmt: skip
        self.model, self.pivots, self.told, self.null = model, pivots, told, null
        self.guidance_scale, self.settings = guidance_scale, settings
        self.rows: list[Conditioning] = []
        self.losses: list[list[float]] = []

    def __call__(self, step: Step, latents: Tensor) -> Conditioning:
        started = self.rows[-1] if self.rows and self.settings.warm_start else self.null.to(latents.device)
        target = self.pivots[step.count - 1 - step.index].to(latents)
        told = self.told if isinstance(self.told, Conditioning) else self.told(step, latents)
        e_cond = self.model.predict(latents, step.timestep, told)
        embeds = started.embeds.float().clone()
        best, losses = embeds, []
        with torch.enable_grad():
            embeds.requires_grad_(True)
            rate = self.settings.rate * (1 - step.index / (2 * step.count))
            adam = torch.optim.Adam([embeds], lr=rate)
            for number in range(self.settings.iterations + 1):
                loss = self._loss(latents, e_cond, replace(started, embeds=embeds), target, step)
                losses.append(float(loss.detach()))
                if losses[-1] <= min(losses):
                    best = embeds.detach().clone()
                if losses[-1] < self._tolerance(step) or number == self.settings.iterations:
                    break
                scale = HALF_SCALE if self.model.dtype == torch.float16 else 1.0
                embeds.grad = torch.autograd.grad(loss * scale, embeds)[0] / scale
                adam.step()
        self.rows.append(replace(started, embeds=best))
        self.losses.append(losses)
        return self.rows[-1]

    def _tolerance(self, step: Step) -> float:
        return self.settings.tolerance + self.settings.growth * step.index * 50 / step.count

    def _loss(self, latents: Tensor, e_cond: Tensor, null: Conditioning, target: Tensor, step: Step) -> Tensor:
        e_null = self.model.predict(latents, step.timestep, null)
        output = e_null + self.guidance_scale * (e_cond - e_null)
        x0, eps = self.model.split(output, latents, step.alpha)
        return (ddim(x0, eps, step.alpha_next) - target).square().mean()
