"""The one denoising loop: sampling, inversion and replay are lists of moves t → t′ carried out by `denoise`.

With the network's raw output split into estimates x̂0 and ε̂ at the incoming level ᾱ, a move to the level ᾱ′ is

    z′ = √ᾱ′ x̂0 + √(1 − ᾱ′ − σ²) ε̂ + σ n          n: stored noise, or drawn per image; σ = 0 is DDIM

Latents (b, c, h, w) are variance preserving throughout, z = √ᾱ x0 + √(1−ᾱ) ε, whatever the scheduler uses inside.
Batch layout: row 0 is the source, rows 1 … the targets (where there is such a pair). With guidance the UNet sees the
rows twice, the null pass first, then the conditional pass; attention hooks see the two apart (`site.branch`).

References: Song et al., "Denoising Diffusion Implicit Models", arXiv 2010.02502, eq. 12;
Ho and Salimans, "Classifier-Free Diffusion Guidance", arXiv 2207.12598, eq. 6.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from personalize.attention import AttentionHook, hooked
from personalize.errors import UserError
from personalize.lean import halves_alike, lean
from personalize.lora import Rules, scaled
from personalize.model import Conditioning, StableDiffusion
from personalize.moves import SCHEDULERS, Move, Moves, Step, blow_up, moves
from personalize.randomness import generator

__all__ = [
    "SCHEDULERS", "Edit", "LatentEdit", "Move", "Moves", "Run", "Step",
    "ddim", "denoise", "initial_latents", "moves", "sample", "trajectory",
]  # fmt: skip


class LatentEdit:
    """Changes latents during the loop; the identity unless overridden."""

    def clean(self, x0: Tensor, step: Step) -> Tensor:
        """Before the move: the estimate of the clean latents (after guidance). In a DDIM move ε̂ stays as it was."""
        return x0

    def latents(self, z: Tensor, step: Step) -> Tensor:
        """After the move: the latents at level `step.end`."""
        return z


Condition = Callable[[Step, Tensor], Conditioning]


@dataclass(frozen=True)
class Edit:
    """What to do while denoising: a value; two edits are combined by joining their tuples.

    Args:
        conditioning: of the prompts, one row or one per row of the latents; or `condition(step, latents)`, called
            before each prediction, outside the hooks, without gradients (an inner optimisation enables them itself).
        negative: the same for the null pass; None is what the base takes for "no prompt".
        guidance_scale: w in ε̂ = ε_null + w (ε_cond − ε_null), diffusers' meaning: 1 is off. One number, or one per row.
        hooks: attention hooks, applied in their order.
        latent_edits: latent edits, applied in their order.
        rule: what the adapter forgets (see `personalize.lora.scaled`), or a function unet → context manager.
        strength: of the adapter.
    """

    conditioning: Conditioning | Condition
    negative: Conditioning | Condition | None = None
    guidance_scale: float | tuple[float, ...] = 7.5
    hooks: tuple[AttentionHook, ...] = ()
    latent_edits: tuple[LatentEdit, ...] = ()
    rule: Rules | Callable[[Any], AbstractContextManager[None]] = None
    strength: float = 1.0


@dataclass(frozen=True)
class Run:
    """A run's `latents` (t+1, b, c, h, w), the start included, and `clean` estimates (t, b, c, h, w)."""

    moves: Moves
    latents: Tensor
    clean: Tensor


@torch.no_grad()
def denoise(
    model: StableDiffusion, latents: Tensor, edit: Edit, moves: Moves, *, seeds: Sequence[int] | None = None
) -> Tensor:
    """Carry out `moves` on `latents` (b, c, h, w) under `edit`; returns the latents at the last level, fp32.

    `seeds`, one per row, are needed where noise is drawn; equal seeds draw equal noise.

    Raises:
        ValueError: rows of latents, conditionings or seeds that do not match, or noise without seeds.
        UserError: an attention hook without a site, a rule without a module.
    """
    if not len(moves):
        raise ValueError("there are no moves to carry out: ask `moves` for at least one step")
    latents = latents.to(model.device, torch.float32)
    edit = _with_null(model, latents, edit)
    solver = _Solver(model, moves, _generators(moves, seeds, len(latents)))
    with lean(model.unet, exact=_exact(model)), _scaled(model.unet, edit):
        for index, move in enumerate(moves):
            step = Step(**vars(move), index=index, count=len(moves))
            output = _guided(model, latents, edit, step)
            latents = solver.move(output, latents, edit, step)
            for change in edit.latent_edits:
                latents = change.latents(latents, step)
    return latents


def trajectory(
    model: StableDiffusion, latents: Tensor, edit: Edit, moves: Moves, *, seeds: Sequence[int] | None = None
) -> Run:
    """`denoise`, remembering every latent and clean estimate as they were after all edits."""
    record = _Record()
    denoise(model, latents, replace(edit, latent_edits=(*edit.latent_edits, record)), moves, seeds=seeds)
    start = latents.to(model.device, torch.float32)
    return Run(moves, torch.stack([start, *record.z]), torch.stack(record.x0))


def initial_latents(model: StableDiffusion, seeds: Sequence[int], size: tuple[int, int] | None = None) -> Tensor:
    """Unit noise, one row per seed, for pictures of `size` (H, W) in pixels.

    Raises UserError unless both are multiples of `model.factor`.
    """
    height, width = size or (model.resolution, model.resolution)
    if height % model.factor or width % model.factor or min(height, width) < model.factor:
        raise UserError(f"a picture of {width}×{height} px: both sides must be multiples of {model.factor}")
    shape = (model.unet.config.in_channels, height // model.factor, width // model.factor)
    return torch.stack([torch.randn(shape, generator=generator(seed, "latents")) for seed in seeds]).to(model.device)


def sample(
    model: StableDiffusion, edit: Edit, seeds: Sequence[int], moves: Moves, size: tuple[int, int] | None = None
) -> Tensor:
    """Clean latents from noise, one row per seed."""
    return denoise(model, moves.begin(initial_latents(model, seeds, size)), edit, moves, seeds=seeds)


def ddim(x0: Tensor, eps: Tensor, alpha_next: float, sigma: float = 0.0, noise: Tensor | None = None) -> Tensor:
    """z′ = √ᾱ′ x0 + √(1 − ᾱ′ − σ²) ε + σ n."""
    alpha = torch.as_tensor(alpha_next, dtype=x0.dtype, device=x0.device)  # rounded to fp32 first, as diffusers does
    moved = alpha.sqrt() * x0 + (1 - alpha - sigma**2).clamp(min=0).sqrt() * eps
    return moved if noise is None else moved + sigma * noise


def _exact(model: StableDiffusion) -> bool:
    """Whether sampling has to agree with stock pipelines to 1e-5: in fp32, where shorter ways would round otherwise."""
    return model.dtype == torch.float32


def _guided(model: StableDiffusion, latents: Tensor, edit: Edit, step: Step) -> Tensor:
    """The raw output after guidance; null rows first, in one batch."""
    cond = _rows(edit.conditioning, step, latents)
    if edit.guidance_scale == 1:
        with hooked(model.unet, edit.hooks, step=step, branches=("cond",)):
            return model.predict(latents, step.timestep, cond)
    assert edit.negative is not None
    both = Conditioning.cat([_rows(edit.negative, step, latents), cond])
    alike = halves_alike(model.unet, wanted=not edit.hooks and not _exact(model))
    with hooked(model.unet, edit.hooks, step=step, branches=("null", "cond")), alike:
        null, told = model.predict(torch.cat([latents, latents]), step.timestep, both).chunk(2)
    scale = torch.as_tensor(edit.guidance_scale, device=latents.device).view(-1, 1, 1, 1)
    return null + scale * (told - null)


def _rows(conditioning: Conditioning | Condition, step: Step, latents: Tensor) -> Conditioning:
    """One row of conditioning per row of latents."""
    found = conditioning if isinstance(conditioning, Conditioning) else conditioning(step, latents)
    found = found.to(latents.device)
    if len(found) == 1:
        return found.repeat(len(latents))
    if len(found) != len(latents):
        raise ValueError(f"{len(found)} rows of conditioning for {len(latents)} rows of latents: give one, or as many")
    return found


def _with_null(model: StableDiffusion, latents: Tensor, edit: Edit) -> Edit:
    """`edit` with the base's own "no prompt" where guidance needs one and none is given."""
    if edit.guidance_scale == 1 or edit.negative is not None:
        return edit
    height, width = (side * model.factor for side in latents.shape[-2:])
    null = model.null(1, (height, width))
    return replace(edit, negative=null)


def _scaled(unet: Any, edit: Edit) -> AbstractContextManager[None]:
    if callable(edit.rule):
        return edit.rule(unet)
    return nullcontext() if edit.rule is None and edit.strength == 1 else scaled(unet, edit.rule, edit.strength)


def _generators(moves: Moves, seeds: Sequence[int] | None, count: int) -> list[torch.Generator] | None:
    if seeds is not None and len(seeds) != count:
        raise ValueError(f"{len(seeds)} seeds for {count} rows of latents: give one for each")
    if seeds is None and moves.draw_noise:
        raise ValueError("these moves draw noise: give `denoise` one seed for each row of latents")
    return [generator(seed, "moves") for seed in seeds] if seeds is not None and moves.draw_noise else None


@dataclass
class _Solver:
    """Does the moves: by the DDIM formula, or by a private copy of the stock scheduler."""

    model: StableDiffusion
    moves: Moves
    generators: list[torch.Generator] | None
    scheduler: Any = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.moves.scheduler is not None:
            self.scheduler = deepcopy(self.moves.scheduler)
            if self.moves.first and hasattr(self.scheduler, "set_begin_index"):
                self.scheduler.set_begin_index(self.moves.first)

    def move(self, output: Tensor, latents: Tensor, edit: Edit, step: Step) -> Tensor:
        edited = any(type(change).clean is not LatentEdit.clean for change in edit.latent_edits)
        if self.scheduler is not None and not edited:
            return self._stock(output, latents, step)
        x0, eps = self.model.split(output, latents, step.alpha)
        for change in edit.latent_edits:
            x0 = change.clean(x0, step)
        if self.scheduler is not None:
            return self._stock(self.model.joined(x0, latents, step.alpha), latents, step)
        return ddim(x0, eps, step.alpha_next, step.sigma, self._noise(latents, step))

    def _noise(self, latents: Tensor, step: Step) -> Tensor | None:
        if step.noise is not None or not step.sigma:
            return None if step.noise is None else step.noise.to(latents)
        assert self.generators is not None
        return torch.stack([torch.randn(latents.shape[1:], generator=one) for one in self.generators]).to(latents)

    def _stock(self, output: Tensor, latents: Tensor, step: Step) -> Tensor:
        """The scheduler's own step, in its own scaling of the latents."""
        index = self.moves.first + step.index
        timestep = self.scheduler.timesteps[index]
        native = latents * blow_up(self.scheduler, index)
        self.scheduler.scale_model_input(native, timestep)  # some schedulers insist
        known = inspect.signature(self.scheduler.step).parameters
        extra = {"generator": self.generators} if "generator" in known and self.generators is not None else {}
        return self.scheduler.step(output, timestep, native, **extra).prev_sample / blow_up(self.scheduler, index + 1)


class _Record(LatentEdit):
    def __init__(self) -> None:
        self.z: list[Tensor] = []
        self.x0: list[Tensor] = []

    def clean(self, x0: Tensor, step: Step) -> Tensor:
        self.x0.append(x0)
        return x0

    def latents(self, z: Tensor, step: Step) -> Tensor:
        self.z.append(z)
        return z
