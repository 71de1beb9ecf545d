"""Moves t → t′ of the latents, as values: what `denoise` carries out, from diffusers' schedulers or made by hand."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from personalize.errors import UserError
from personalize.model import StableDiffusion

SCHEDULERS: dict[str, tuple[type, dict[str, Any]]] = {
    "ddim": (DDIMScheduler, {}),
    "ddpm": (DDPMScheduler, {}),
    "euler": (EulerDiscreteScheduler, {}),
    "euler_a": (EulerAncestralDiscreteScheduler, {}),
    "heun": (HeunDiscreteScheduler, {}),
    "pndm": (PNDMScheduler, {"skip_prk_steps": True}),
    "unipc": (UniPCMultistepScheduler, {}),
    "dpm++_2m": (DPMSolverMultistepScheduler, {}),
    "dpm++_2m_karras": (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "dpm++_2m_sde": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
}


@dataclass(frozen=True)
class Move:
    """One move of latents from level `start` to level `end` (timesteps; below 0: clean); the UNet is told `timestep`.

    `alpha` and `alpha_next` are ᾱ at the two levels, `sigma` is σ above, `noise` (b, c, h, w) is stored n.
    """

    start: float
    end: float
    timestep: float
    alpha: float
    alpha_next: float
    sigma: float = 0.0
    noise: Tensor | None = None


@dataclass(frozen=True)
class Step(Move):
    """The move under way: number `index` (from 0) of `count`."""

    index: int = 0
    count: int = 1


@dataclass(frozen=True)
class Moves:
    """A list of moves, in the order of execution; slicing gives a part of it.

    `scheduler` is a diffusers scheduler, set to its timesteps, whose `step` does the moves (move i is its step
    `first` + i); without one they are the DDIM formula.
    """

    steps: tuple[Move, ...]
    scheduler: Any = None
    first: int = 0
    scale: float = 1.0  # of unit noise, to be latents at the first move

    @property
    def draw_noise(self) -> bool:
        """Is noise drawn on the way, beyond what is stored?"""
        if self.scheduler is None:
            return any(move.sigma and move.noise is None for move in self.steps)
        algorithm = getattr(self.scheduler.config, "algorithm_type", "")
        return isinstance(self.scheduler, DDPMScheduler | EulerAncestralDiscreteScheduler) or algorithm.startswith(
            "sde"
        )

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[Move]:
        return iter(self.steps)

    def __getitem__(self, part: slice) -> Moves:
        first = range(len(self))[part].start
        return replace(self, steps=self.steps[part], first=self.first + first, scale=self.scale if first == 0 else 1.0)

    def begin(self, noise: Tensor, clean: Tensor | None = None) -> Tensor:
        """Latents at which the moves start, from unit noise, and for image-to-image from `clean` latents under it."""
        if clean is None:
            return self.scale * noise
        alpha = self.steps[0].alpha
        return alpha**0.5 * clean + (1 - alpha) ** 0.5 * noise


def moves(
    model: StableDiffusion,
    steps: int,
    scheduler: str = "ddim",
    *,
    strength: float = 1.0,
    inverse: bool = False,
    eta: float = 0.0,
) -> Moves:
    """The timesteps that diffusers' `scheduler` visits with the base's own settings, as moves.

    Args:
        steps: of the whole way, from noise to clean.
        scheduler: a name in SCHEDULERS.
        strength: share of the way, its clean end, as in image-to-image: 1 is all, 0.7 of 10 steps are the last 7.
        inverse: DDIM only: the same levels from clean to noisy. The UNet is told the upper timestep of each move, as
            in the replay.
        eta: DDIM only: σ = η √((1−ᾱ′)/(1−ᾱ)) √(1 − ᾱ/ᾱ′); 1 is as noisy as DDPM.

    Raises:
        UserError: an unknown scheduler, no step left, `inverse` or `eta` with another scheduler than ddim, or both.
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
    stock = _stock(scheduler, config)
    stock.set_timesteps(steps)
    skipped = (steps - min(int(steps * strength), steps)) * getattr(stock, "order", 1)
    if skipped >= len(stock.timesteps):
        raise UserError(f"strength {strength} of {steps} steps leaves no step: raise one of them")
    if scheduler == "ddim":
        spacing = config.num_train_timesteps // steps
        found = [_ddim_move(model, int(t), int(t) - spacing, eta) for t in stock.timesteps[skipped:]]
        return Moves(tuple(_inverted(move) for move in reversed(found)) if inverse else tuple(found))
    return _delegated(model, stock)[skipped:]


def _stock(name: str, config: Any) -> Any:
    cls, settings = SCHEDULERS[name]
    if "clip_sample" in inspect.signature(cls).parameters:
        settings = settings | {"clip_sample": False}  # latents, unlike pixels, have no bounds
    return cls.from_config(config, **settings)


def _ddim_move(model: StableDiffusion, start: int, end: int, eta: float) -> Move:
    alpha, alpha_next = model.alpha(start), model.alpha(end)
    sigma = eta * ((1 - alpha_next) / (1 - alpha)) ** 0.5 * max(0.0, 1 - alpha / alpha_next) ** 0.5
    return Move(start, end, start, alpha, alpha_next, sigma)


def _inverted(move: Move) -> Move:
    return replace(move, start=move.end, end=move.start, alpha=move.alpha_next, alpha_next=move.alpha)


def _delegated(model: StableDiffusion, stock: Any) -> Moves:
    """Moves that only say where `stock` goes; its `step` knows how."""
    times = [float(t) for t in stock.timesteps]
    alphas = [_stock_alpha(model, stock, index) for index in range(len(times) + 1)]
    ways = zip(times, [*times[1:], -1.0], alphas, alphas[1:], strict=False)
    found = tuple(Move(start, end, start, alpha, after) for start, end, alpha, after in ways)
    return Moves(found, stock, 0, float(stock.init_noise_sigma) / blow_up(stock, 0))


def _stock_alpha(model: StableDiffusion, stock: Any, index: int) -> float:
    if hasattr(stock, "sigmas"):
        return 1 / (1 + float(stock.sigmas[index]) ** 2)
    return model.alpha(int(stock.timesteps[index])) if index < len(stock.timesteps) else model.final_alpha


def blow_up(stock: Any, index: int) -> float:
    """Factor from variance preserving latents to the scheduler's own: √(1 + σ²) if it lets the variance explode."""
    explodes = float(stock.init_noise_sigma) != 1
    return (1 + float(stock.sigmas[index]) ** 2) ** 0.5 if explodes else 1.0
