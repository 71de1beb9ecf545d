"""Null-text inversion: fit a null embedding for each step so that guided sampling follows the inverted latents.

    L(U) = mean (z*_{t′} − DDIM(z̄_t, ε_U + w (ε_C − ε_U)))²          U (1, l, d); a few updates with Adam at each step

z* are the latents of the inversion, z̄ those of guided sampling, ε_C and ε_U the conditional and null predictions.

References: Mokady et al., "Null-text Inversion for Editing Real Images", arXiv 2211.09794, eq. 3 and algorithm 1.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from personalize.models.gradient_checkpointing import gradient_checkpointing
from personalize.models.loss_scaling import set_gradients
from personalize.models.stable_diffusion import Conditioning, StableDiffusion
from personalize.models.transfer import sent
from personalize.sampling.config import NullTextSettings
from personalize.sampling.denoise import Condition, ddim
from personalize.sampling.schedule import Step


class NullFit:
    """Fits the null embedding of each step while `denoise` samples: it is given to `Edit` as `negative`.

    The result of a step is the embedding with the smallest loss, so that no step ends worse than it began. The weights
    of the model are not changed. `rows` collects the fitted conditionings. The device is read before each update whose
    loss can end the step, and nowhere else.

    Args:
        pivots: latents of the inversion (t+1, 1, c, h, w), clean ones first.
        conditioning: of the source prompt, or a function of step and latents that returns it.
        null: the conditioning at which the first step starts, one row.
        guidance_scale: w of the guided sampling.
    """

    def __init__(
        self, model: StableDiffusion, pivots: Tensor, conditioning: Conditioning | Condition, null: Conditioning,
        guidance_scale: float, settings: NullTextSettings,
    ) -> None:  # fmt: skip
        self.model, self.pivots, self.conditioning, self.null = model, pivots, conditioning, null
        self.guidance_scale, self.settings = guidance_scale, settings
        self.rows: list[Conditioning] = []
        self._losses: list[list[Tensor]] = []

    @property
    def fitted(self) -> Conditioning:
        """The null conditioning of every step, a row each; the one row to start at if guidance was off throughout."""
        return Conditioning.cat(self.rows) if self.rows else self.null

    @property
    def losses(self) -> list[list[float]]:
        """The losses of each step: before each of its updates, and after the last unless one ended the step."""
        return [torch.stack(step).tolist() for step in self._losses]

    def __call__(self, step: Step, latents: Tensor) -> Conditioning:
        initial = self.rows[-1] if self.rows and self.settings.warm_start else self.null.to(latents.device)
        target = sent(self.pivots[step.count - 1 - step.index], latents.device).to(latents)
        given = self.conditioning
        conditioning = given if isinstance(given, Conditioning) else given(step, latents)
        e_cond = self.model.predict(latents, step.timestep, conditioning)
        best = initial.embeds.float()
        embeds, least, losses = best.clone(), torch.full((), torch.inf, device=latents.device), list[Tensor]()
        limit = self._tolerance(step)
        checkpointing = gradient_checkpointing(self.model.unet, self.settings.gradient_checkpointing)
        with torch.enable_grad(), checkpointing:
            embeds.requires_grad_(True)
            rate = self.settings.rate * (1 - step.index / (2 * step.count))
            adam = torch.optim.Adam([embeds], lr=rate)
            for number in range(self.settings.iterations + 1):
                loss = self._loss(latents, e_cond, replace(initial, embeds=embeds), target, step)
                losses.append(loss.detach().float())
                better = losses[-1] <= least
                best, least = torch.where(better, embeds.detach(), best), torch.where(better, losses[-1], least)
                if number == self.settings.iterations or limit > 0 and float(losses[-1]) < limit:
                    break
                set_gradients(loss, [embeds], self.model.dtype)
                adam.step()
        self.rows.append(replace(initial, embeds=best))
        self._losses.append(losses)
        return self.rows[-1]

    def _tolerance(self, step: Step) -> float:
        return self.settings.tolerance + self.settings.growth * step.index * 50 / step.count

    def _loss(self, latents: Tensor, e_cond: Tensor, null: Conditioning, target: Tensor, step: Step) -> Tensor:
        e_null = self.model.predict(latents, step.timestep, null)
        output = e_null + self.guidance_scale * (e_cond - e_null)
        x0, eps = self.model.split(output, latents, step.alpha)
        return (ddim(x0, eps, step.alpha_next) - target).square().mean()
