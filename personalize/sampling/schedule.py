"""Schedules of transitions t → t′ between noise levels, which `denoise` carries out.

A `Schedule` is a list of `Transition`s. It is built from the timesteps of a diffusers scheduler, in either direction
(sampling or inversion), or by hand.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from personalize.errors import UserError
from personalize.models.parameterization import noised
from personalize.models.stable_diffusion import StableDiffusion
from personalize.sampling.config import SCHEDULERS, SPACINGS


@dataclass(frozen=True)
class Transition:
    """One update of the latents, from the noise level at `start` to the one at `end`.

    start, end: timesteps; a value below 0 means clean latents.
    timestep: what the UNet receives as its timestep.
    alpha, alpha_next: ᾱ at `start` and at `end`.
    sigma, noise: σ and the stored noise n (b, c, h, w) of the DDIM formula, see `personalize.sampling.denoise`.
    """

    start: float
    end: float
    timestep: float
    alpha: float
    alpha_next: float
    sigma: float = 0.0
    noise: Tensor | None = None


@dataclass(frozen=True)
class Step(Transition):
    """A transition that is being carried out, and its place in the schedule: number `index` (from 0) of `count`."""

    index: int = 0
    count: int = 1


@dataclass(frozen=True)
class Schedule:
    """The transitions of one sampling or inversion, in the order of execution; a slice is a schedule too.

    steps: the transitions.
    scheduler: a diffusers scheduler with its timesteps set, whose `step` computes the transitions; None: the DDIM
        formula does.
    first: the number of the scheduler's step that computes the first transition.
    scale: factor that turns unit noise into latents at the start of the first transition.
    """

    steps: tuple[Transition, ...]
    scheduler: Any = None
    first: int = 0
    scale: float = 1.0

    @property
    def draw_noise(self) -> bool:
        """Whether carrying out the schedule draws new random noise, beyond the noise that is stored."""
        if self.scheduler is None:
            return any(transition.sigma and transition.noise is None for transition in self.steps)
        from diffusers import DDPMScheduler, EulerAncestralDiscreteScheduler

        stochastic = isinstance(self.scheduler, DDPMScheduler | EulerAncestralDiscreteScheduler)
        return stochastic or getattr(self.scheduler.config, "algorithm_type", "").startswith("sde")

    def numbered(self) -> list[Step]:
        """The transitions, each with its place in the schedule."""
        return [Step(**vars(one), index=index, count=len(self.steps)) for index, one in enumerate(self.steps)]

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[Transition]:
        return iter(self.steps)

    def __getitem__(self, part: slice) -> Schedule:
        first = range(len(self))[part].start
        return replace(self, steps=self.steps[part], first=self.first + first, scale=self.scale if first == 0 else 1.0)

    def begin(self, noise: Tensor, clean: Tensor | None = None) -> Tensor:
        """Latents at the start of the first transition: scaled unit noise, or `clean` latents with noise added.

        The latter is image-to-image:  √ᾱ clean + √(1−ᾱ) noise,  with ᾱ of the first transition.
        """
        if clean is None:
            return self.scale * noise
        return noised(clean, noise, self.steps[0].alpha)


def make_schedule(
    model: StableDiffusion,
    steps: int,
    scheduler: str = "ddim",
    *,
    strength: float = 1.0,
    inverse: bool = False,
    eta: float = 0.0,
    spacing: str | None = None,
) -> Schedule:
    """The schedule of a diffusers scheduler with the base model's own scheduler settings.

    Args:
        steps: number of steps from pure noise to clean latents.
        scheduler: a name in SCHEDULERS.
        strength: as in image-to-image, the share of the steps that is kept, at the clean end: 1 keeps all, 0.7 of 10
            steps keeps the last 7.
        spacing: diffusers' `timestep_spacing`, "leading", "trailing" or "linspace"; by default the base's own.
        inverse: for ddim alone: the same noise levels from clean to noisy. The UNet receives the noisier timestep of
            each transition, as it does while sampling.
        eta: for ddim alone: σ = η √((1−ᾱ′)/(1−ᾱ)) √(1 − ᾱ/ᾱ′); 1 adds as much noise as DDPM.

    Raises:
        UserError: the scheduler is unknown or does not know the base's noise schedule, no step is left, `inverse` or
            `eta` is given to another scheduler than ddim, or both are given.
    """
    if scheduler not in SCHEDULERS:
        raise UserError(f"unknown scheduler {scheduler!r}: choose one of {', '.join(SCHEDULERS)}")
    if scheduler != "ddim" and (inverse or eta):
        raise UserError(f"only ddim can be inverted or take eta, not {scheduler}: choose the scheduler ddim")
    if inverse and eta:
        raise UserError("inversion draws no noise: leave eta at 0")
    config = model.scheduler.config
    most = config.num_train_timesteps - config.get("steps_offset", 0)
    if not 1 <= steps <= most:
        raise UserError(f"{steps} steps: choose 1 to {most}")
    instance = _diffusers_scheduler(scheduler, config, {} if spacing is None else {"timestep_spacing": spacing})
    instance.set_timesteps(steps)
    skipped = (steps - min(int(steps * strength), steps)) * getattr(instance, "order", 1)
    if skipped >= len(instance.timesteps):
        raise UserError(f"strength {strength} of {steps} steps leaves no step: raise one of them")
    if scheduler == "ddim":
        starts = [int(t) for t in instance.timesteps]
        pairs = list(zip(starts, [*starts[1:], -1], strict=True))[skipped:]  # each ends where the next begins
        steps_down = [_ddim_transition(model, start, end, eta) for start, end in pairs]
        return Schedule(tuple(map(_reversed, reversed(steps_down))) if inverse else tuple(steps_down))
    return _scheduler_steps(model, instance)[skipped:]


def _diffusers_scheduler(name: str, config: Any, more: dict[str, Any]) -> Any:
    import diffusers

    cls, settings = getattr(diffusers, SCHEDULERS[name][0]), SCHEDULERS[name][1] | more
    known = inspect.signature(cls).parameters
    if config.get("rescale_betas_zero_snr") and "rescale_betas_zero_snr" not in known:
        raise UserError(
            f"{name} does not know the noise schedule of this base, which ends at zero SNR: choose ddim, euler, "
            "euler_a, unipc or dpm++_2m"
        )
    settings = {spacing: False for spacing in SPACINGS if spacing in known} | settings
    if "clip_sample" in known:
        settings = settings | {"clip_sample": False}  # latents, unlike pixels, have no bounds
    return cls.from_config(config, **settings)


def _ddim_transition(model: StableDiffusion, start: int, end: int, eta: float) -> Transition:
    alpha, alpha_next = model.alpha(start), model.alpha(end)
    sigma = eta * ((1 - alpha_next) / (1 - alpha)) ** 0.5 * max(0.0, 1 - alpha / alpha_next) ** 0.5
    return Transition(start, end, start, alpha, alpha_next, sigma)


def _reversed(step: Transition) -> Transition:
    return replace(step, start=step.end, end=step.start, alpha=step.alpha_next, alpha_next=step.alpha)


def _scheduler_steps(model: StableDiffusion, scheduler: Any) -> Schedule:
    """The schedule of a diffusers scheduler: its noise levels; its own `step` computes the latents."""
    times = [float(t) for t in scheduler.timesteps]
    alphas = [_scheduler_alpha(model, scheduler, index) for index in range(len(times) + 1)]
    levels = zip(times, [*times[1:], -1.0], alphas, alphas[1:], strict=False)
    steps = tuple(Transition(start, end, start, alpha, after) for start, end, alpha, after in levels)
    return Schedule(steps, scheduler, 0, float(scheduler.init_noise_sigma) / variance_scale(scheduler, 0))


def _scheduler_alpha(model: StableDiffusion, scheduler: Any, index: int) -> float:
    """ᾱ before step number `index` of a diffusers scheduler."""
    if hasattr(scheduler, "sigmas"):
        return 1 / (1 + float(scheduler.sigmas[index]) ** 2)
    timesteps = scheduler.timesteps
    return model.alpha(int(timesteps[index])) if index < len(timesteps) else model.final_alpha


def variance_scale(scheduler: Any, index: int) -> float:
    """Factor from variance-preserving latents to those a diffusers scheduler works on, before its step `index`.

    It is √(1 + σ²) for variance-exploding schedulers, such as Euler, and 1 for the others.
    """
    explodes = float(scheduler.init_noise_sigma) != 1
    return (1 + float(scheduler.sigmas[index]) ** 2) ** 0.5 if explodes else 1.0
