"""The denoising loop: `denoise` carries out a schedule of transitions t → t′ for sampling, inversion and replay alike.

The UNet's raw output at the level ᾱ is split into estimates x̂0 and ε̂. A transition to the level ᾱ′ is then

    z′ = √ᾱ′ x̂0 + √(1 − ᾱ′ − σ²) ε̂ + σ n          n: stored noise, or drawn for each image; σ = 0 is DDIM

Latents (b, c, h, w) are variance preserving, z = √ᾱ x0 + √(1−ᾱ) ε, also where a diffusers scheduler scales them
otherwise inside. An edit of an image has the source in row 0 of the batch and the targets in rows 1 …. With guidance
the batch goes through the UNet twice at once: the unconditional (null) half first, then the conditional half.
Attention hooks are called for each half separately (`site.branch`).

References: Song et al., "Denoising Diffusion Implicit Models", arXiv 2010.02502, eq. 12;
Ho and Salimans, "Classifier-Free Diffusion Guidance", arXiv 2207.12598, eq. 6.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from personalize.adapters.lora_scales import Rules, scaled
from personalize.errors import UserError
from personalize.io.progress import ticked
from personalize.models.attention import AttentionHook, hooked
from personalize.models.conditioning import of_one_length
from personalize.models.fast_paths import fast_paths, shared_guidance_prefix
from personalize.models.parameterization import as_alpha
from personalize.models.stable_diffusion import Conditioning, StableDiffusion
from personalize.models.transfer import HostNumbers, constant, sent
from personalize.randomness import generator
from personalize.sampling.graphed_steps import graphed
from personalize.sampling.schedule import Schedule, Step, variance_scale


class LatentEdit:
    """Base class for what changes the latents during the loop; both methods return their input unless overridden."""

    def clean(self, x0: Tensor, step: Step) -> Tensor:
        """Change x̂0 (b, c, h, w), the guided estimate of the clean latents, before a transition; ε̂ is not changed."""
        return x0

    def latents(self, z: Tensor, step: Step) -> Tensor:
        """Change the latents (b, c, h, w) after a transition, when they are at the level `step.end`."""
        return z


Condition = Callable[[Step, Tensor], Conditioning]


@dataclass(frozen=True)
class Edit:
    """The conditioning, guidance, attention hooks and latent edits of one call of `denoise`.

    Args:
        conditioning: of the prompts, one row or one for each row of the latents; or a function of step and latents
            that returns it. The function is called before each prediction, without attention hooks and without
            gradients; one that optimises something enables gradients itself.
        negative: the same for the unconditional pass; None is the base model's conditioning for "no prompt".
        guidance_scale: w in  ε̂ = ε_null + w (ε_cond − ε_null), as in diffusers: one number up to 1 is off, and the
            prompt's pass is all. One number, or one per row, each of which is used as it is.
        hooks: attention hooks, called in this order.
        latent_edits: latent edits, called in this order.
        rule: forgetting rules for the adapter (`adapters.lora_scales.scaled`), or a function that takes the UNet and
            returns a context manager.
        strength: factor on the whole adapter.
    """

    conditioning: Conditioning | Condition
    negative: Conditioning | Condition | None = None
    guidance_scale: float | tuple[float, ...] = 7.5
    hooks: tuple[AttentionHook, ...] = ()
    latent_edits: tuple[LatentEdit, ...] = ()
    rule: Rules | Callable[[Any], AbstractContextManager[None]] = None
    strength: float = 1.0

    @property
    def guided(self) -> bool:
        """Whether an unconditional pass is made."""
        return not isinstance(self.guidance_scale, int | float) or self.guidance_scale > 1


@dataclass(frozen=True)
class DenoisingHistory:
    """What `denoise_with_history` recorded: `latents` (t+1, b, c, h, w), the initial ones first, and x̂0 as `clean`.

    `clean` (t, b, c, h, w) are the estimates of the clean latents, after all latent edits.
    """

    schedule: Schedule
    latents: Tensor
    clean: Tensor


@torch.no_grad()
def denoise(
    model: StableDiffusion, latents: Tensor, edit: Edit, schedule: Schedule, *, seeds: Sequence[int] | None = None,
    cuda_graph: bool = False,
) -> Tensor:  # fmt: skip
    """Carry out `schedule` on `latents` (b, c, h, w) under `edit`; returns the latents at the last level in fp32.

    `seeds`, one per row, are needed where noise is drawn; rows of equal seed draw equal noise.  With `cuda_graph` the
    steps replay one CUDA graph, or a warning says why they do not, see `graphed_steps`.

    Raises:
        ValueError: the schedule is empty; latents, conditionings and seeds differ in their number of rows; or noise is
            to be drawn and there are no seeds.
        UserError: an attention hook matches no attention layer, a forgetting rule matches no LoRA layer, or
            `cuda_graph` is given and the model is on no CUDA device.
    """
    if not len(schedule):
        raise ValueError("the schedule is empty: call `make_schedule` with at least one step")
    latents = latents.to(model.device, torch.float32)
    edit = _with_null(model, latents, edit)
    solver = _Solver(model, schedule, _generators(schedule, seeds, len(latents)))
    with fast_paths(model.unet, exact=_exact(model)), _scaled(model.unet, edit):
        predict, move = partial(_guided, model), solver.step
        if cuda_graph:
            predict, move = graphed(model, latents, edit, schedule, predict, move)
        for step in ticked(schedule.numbered()):
            latents = move(predict(latents, edit, step), latents, edit, step)
            for change in edit.latent_edits:
                latents = change.latents(latents, step)
    return latents


def denoise_with_history(
    model: StableDiffusion, latents: Tensor, edit: Edit, schedule: Schedule, *, seeds: Sequence[int] | None = None
) -> DenoisingHistory:
    """`denoise`, but returns the latents and estimates x̂0 of all steps, as they were after all latent edits."""
    record = _Record()
    denoise(model, latents, replace(edit, latent_edits=(*edit.latent_edits, record)), schedule, seeds=seeds)
    start = latents.to(model.device, torch.float32)
    return DenoisingHistory(schedule, torch.stack([start, *record.z]), torch.stack(record.x0))


def initial_latents(model: StableDiffusion, seeds: Sequence[int], size: tuple[int, int] | None = None) -> Tensor:
    """Unit noise (b, c, h, w), one row for each seed, for images of `size` (H, W) in pixels.

    Raises UserError unless both sides are multiples of `model.factor`.
    """
    height, width = size or (model.resolution, model.resolution)
    if height % model.factor or width % model.factor or min(height, width) < model.factor:
        raise UserError(f"a picture of {width}×{height} px: both sides must be multiples of {model.factor}")
    shape = (model.unet.config.out_channels, height // model.factor, width // model.factor)
    noise = torch.stack([torch.randn(shape, generator=generator(seed, "latents")) for seed in seeds])
    return sent(noise, model.device)


def sample(
    model: StableDiffusion, edit: Edit, seeds: Sequence[int], schedule: Schedule, size: tuple[int, int] | None = None,
    cuda_graph: bool = False,
) -> Tensor:  # fmt: skip
    """Sample clean latents (b, c, h, w) from noise, one row for each seed; `cuda_graph` as for `denoise`."""
    noise = schedule.begin(initial_latents(model, seeds, size))
    return denoise(model, noise, edit, schedule, seeds=seeds, cuda_graph=cuda_graph)


def ddim(
    x0: Tensor, eps: Tensor, alpha_next: float | Tensor, sigma: float = 0.0, noise: Tensor | None = None
) -> Tensor:
    """Latents at the level ᾱ′ = `alpha_next`:  z′ = √ᾱ′ x0 + √(1 − ᾱ′ − σ²) ε + σ n."""
    alpha = as_alpha(alpha_next, x0)  # rounded to fp32 first, as diffusers does
    latents = alpha.sqrt() * x0 + (1 - alpha - sigma**2).clamp(min=0).sqrt() * eps
    return latents if noise is None else latents + sigma * noise


def _exact(model: StableDiffusion) -> bool:
    """Whether sampling must agree with diffusers' pipelines to 1e-5: in fp32, where faster paths round otherwise."""
    return model.dtype == torch.float32


def _guided(model: StableDiffusion, latents: Tensor, edit: Edit, step: Step) -> Tensor:
    """The UNet's raw output after guidance; both halves are one batch, the unconditional rows first."""
    cond = _rows(edit.conditioning, step, latents)
    if not edit.guided:
        with hooked(model.unet, edit.hooks, step=step, branches=("cond",)):
            return model.predict(latents, step.timestep, cond)
    assert edit.negative is not None
    both = Conditioning.cat(of_one_length([_rows(edit.negative, step, latents), cond]))
    shared = shared_guidance_prefix(model.unet, wanted=not edit.hooks and not _exact(model))
    with hooked(model.unet, edit.hooks, step=step, branches=("null", "cond")), shared:
        null, conditional = model.predict(torch.cat([latents, latents]), step.timestep, both).chunk(2)
    scale = edit.guidance_scale
    if not isinstance(scale, int | float):
        scale = constant(scale, latents).view(-1, 1, 1, 1)
    return null + scale * (conditional - null)


def _rows(conditioning: Conditioning | Condition, step: Step, latents: Tensor) -> Conditioning:
    """The conditioning of one step, with one row for each row of the latents."""
    rows = conditioning if isinstance(conditioning, Conditioning) else conditioning(step, latents)
    rows = rows.to(latents.device)
    if len(rows) == 1:
        return rows.repeat(len(latents))
    if len(rows) != len(latents):
        raise ValueError(f"{len(rows)} rows of conditioning for {len(latents)} rows of latents: give one, or as many")
    return rows


def _with_null(model: StableDiffusion, latents: Tensor, edit: Edit) -> Edit:
    """`edit`, with the base model's conditioning for "no prompt" as `negative` if guidance needs one and has none."""
    if not edit.guided or edit.negative is not None:
        return edit
    height, width = (side * model.factor for side in latents.shape[-2:])
    return replace(edit, negative=model.null(1, (height, width)))


def _scaled(unet: Any, edit: Edit) -> AbstractContextManager[None]:
    if callable(edit.rule):
        return edit.rule(unet)
    return nullcontext() if edit.rule is None and edit.strength == 1 else scaled(unet, edit.rule, edit.strength)


def _generators(schedule: Schedule, seeds: Sequence[int] | None, count: int) -> list[torch.Generator] | None:
    if seeds is not None and len(seeds) != count:
        raise ValueError(f"{len(seeds)} seeds for {count} rows of latents: give one for each")
    if seeds is None and schedule.draw_noise:
        raise ValueError("this schedule draws noise: give `denoise` one seed for each row of latents")
    # The purpose "moves" is part of what is drawn: another word would give other images for the same seed.
    return [generator(seed, "moves") for seed in seeds] if seeds is not None and schedule.draw_noise else None


@dataclass
class _Solver:
    """Computes the transitions: by the DDIM formula, or with a copy of the schedule's diffusers scheduler."""

    model: StableDiffusion
    schedule: Schedule
    generators: list[torch.Generator] | None
    scheduler: Any = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.schedule.scheduler is not None:
            self.scheduler = deepcopy(self.schedule.scheduler)
            if self.schedule.first and hasattr(self.scheduler, "set_begin_index"):
                self.scheduler.set_begin_index(self.schedule.first)

    def step(self, output: Tensor, latents: Tensor, edit: Edit, step: Step) -> Tensor:
        edited = any(type(change).clean is not LatentEdit.clean for change in edit.latent_edits)
        if self.scheduler is not None and not edited:
            return self._scheduler_step(output, latents, step)
        x0, eps = self.model.split(output, latents, step.alpha)
        for change in edit.latent_edits:
            x0 = change.clean(x0, step)
        if self.scheduler is not None:
            return self._scheduler_step(self.model.joined(x0, latents, step.alpha), latents, step)
        return ddim(x0, eps, step.alpha_next, step.sigma, self._noise(latents, step))

    def _noise(self, latents: Tensor, step: Step) -> Tensor | None:
        if step.noise is not None:
            return sent(step.noise, latents.device).to(latents)
        if not step.sigma:
            return None
        assert self.generators is not None
        drawn = torch.stack([torch.randn(latents.shape[1:], generator=one) for one in self.generators])
        return sent(drawn, latents.device).to(latents)

    def _scheduler_step(self, output: Tensor, latents: Tensor, step: Step) -> Tensor:
        """The diffusers scheduler's own step; it sees the latents in its own scaling."""
        index = self.schedule.first + step.index
        timestep = self.scheduler.timesteps[index]
        scaled_latents = latents * variance_scale(self.scheduler, index)
        self.scheduler.scale_model_input(scaled_latents, timestep)  # some schedulers raise without this call
        accepted = inspect.signature(self.scheduler.step).parameters
        extra = {"generator": self.generators} if "generator" in accepted and self.generators is not None else {}
        with nullcontext() if latents.device.type == "cpu" else HostNumbers():
            after = self.scheduler.step(output, timestep, scaled_latents, **extra).prev_sample
        return after / variance_scale(self.scheduler, index + 1)


class _Record(LatentEdit):
    """Keeps the latents and the estimates x̂0 of every step, and changes nothing."""

    def __init__(self) -> None:
        self.z: list[Tensor] = []
        self.x0: list[Tensor] = []

    def clean(self, x0: Tensor, step: Step) -> Tensor:
        self.x0.append(x0)
        return x0

    def latents(self, z: Tensor, step: Step) -> Tensor:
        self.z.append(z)
        return z
