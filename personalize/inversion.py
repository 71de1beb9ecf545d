"""Inversion: from a picture to the noise from which sampling comes back to it, five ways.

    ddim       moves from clean to noisy without guidance; guided sampling drifts away from the picture
    direct     the same, and while sampling the source row is put back on the trajectory after every move: exact
    negative   the same, with the source prompt in the null pass: the source row is sampled without guidance
    null-text  the same, with a null embedding for each step fitted so that guided sampling follows the trajectory
    ddpm       independent noisy versions of the picture, and the noise that stochastic steps between them need: exact

With `fixed_point` iterations all but ddpm solve every move for the latents from which sampling without guidance leads
back; plain inversion takes the network's answer at the lower latents for that at the upper ones.

Each gives a `Trajectory`, whose `edit`, `start` and `moves` are what `denoise` takes.

References: Song et al., arXiv 2010.02502, eq. 14; Ju et al., "Direct Inversion", arXiv 2310.01506; Miyake et al.,
"Negative-prompt Inversion", arXiv 2305.16807; Mokady et al., arXiv 2211.09794; Huberman-Spiegelglas et al., "An Edit
Friendly DDPM Noise Space", arXiv 2304.06140; Garibi et al., "ReNoise", arXiv 2403.14602, for fixed points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from personalize.alignment import tokenised
from personalize.attention import AttentionHook
from personalize.errors import UserError
from personalize.frames import Frame, Picture, opened
from personalize.model import Conditioning, StableDiffusion
from personalize.moves import Moves, Step, moves
from personalize.null_text import NULL_TEXT, NullFit, NullText
from personalize.randomness import generator
from personalize.sampling import Edit, LatentEdit, ddim, denoise, trajectory
from personalize.trajectories import MANIFEST, Trajectory, key_of, made_of, with_noise

METHODS = ("direct", "ddim", "negative", "null-text", "ddpm")
GUIDANCE = {"null-text": 7.5, "ddpm": 3.5}  # where inverting itself is guided
STRENGTH = {"ddpm": 0.64}  # its authors skip the noisiest 36 of 100 steps


@torch.no_grad()
def invert(
    model: StableDiffusion,
    image: Picture | Tensor,
    prompt: str,
    method: str = "direct",
    *,
    steps: int = 50,
    strength: float | None = None,
    guidance_scale: float | None = None,
    seed: int = 0,
    null_text: NullText = NULL_TEXT,
    fixed_point: int = 0,
    resolution: int | None = None,
    hooks: Sequence[AttentionHook] = (),
    folder: str | Path | None = None,
    cache: str | Path | None = None,
) -> Trajectory:
    """The trajectory of `image` under `prompt`, with whatever adapter and learned tokens `model` carries.

    Args:
        image: a picture of any size, scaled down to about `resolution`² px (by default the base's own) and padded; or
            pixels (1, 3, H, W) in [−1, 1], taken as they are.
        prompt: what the picture shows.
        steps: of the whole way; `strength` is the share of it that is gone, by default 1, and 0.64 for ddpm.
        guidance_scale: of null-text, 7.5, what sampling will use; and of ddpm's source row, 3.5.
        seed: of ddpm's noise.
        null_text: how null embeddings are fitted.
        fixed_point: iterations at each move, a prediction each; none of ddpm.
        hooks: what else looks on while it is inverted, and changes nothing; they see nothing where the trajectory is
            found, and nothing of ddpm.
        folder: where the trajectory is kept, and taken from if it is there already.
        cache: the same, in a folder below this one that is named after the content.

    Raises:
        UserError: an unknown method, fixed points of ddpm, a prompt of more than 77 tokens, or a trajectory in `folder`
            of something else.
    """
    _require(method, fixed_point)
    tokenised(model, prompt)
    pixels = image if isinstance(image, Tensor) else Frame.of(model, opened(image), resolution).pixels
    size = (pixels.shape[-2], pixels.shape[-1])
    told, null = model.prompts([prompt], size), model.null(1, size)
    strength = STRENGTH.get(method, 1.0) if strength is None else strength
    if guidance_scale is None or method not in GUIDANCE:
        guidance_scale = GUIDANCE.get(method, 1.0)
    settings = {"method": method, "steps": steps, "strength": strength, "guidance_scale": guidance_scale}
    settings |= {"seed": seed} if method == "ddpm" else {}
    settings |= {"fixed_point": fixed_point} if fixed_point else {}
    settings |= {"null_text": asdict(null_text)} if method == "null-text" else {}
    about = made_of(model, pixels, prompt, told, settings)
    place = Path(folder) if folder else Path(cache) / key_of(about)[:16] if cache else None
    if place is not None and (place / MANIFEST).is_file():
        found = Trajectory.load(place)
        found.require({name: value for name, value in about.items() if name != "name"}, place)
        return found
    found = _inverted(model, model.encode(pixels), told, null, about, null_text, hooks)
    if place is not None:
        found.save(place)
    return found


def _require(method: str, fixed_point: int) -> None:
    if method not in METHODS:
        raise UserError(f"unknown inversion {method!r}: choose one of {', '.join(METHODS)}")
    if fixed_point < 0 or fixed_point and method == "ddpm":
        raise UserError(f"{fixed_point} fixed-point iterations of {method}: give 0 or more, and none to ddpm")


def _inverted(
    model: StableDiffusion,
    clean: Tensor,
    told: Conditioning,
    null: Conditioning,
    about: dict,
    null_text: NullText,
    hooks: Sequence[AttentionHook],
) -> Trajectory:
    method, plan = about["method"], {"steps": about["steps"], "strength": about["strength"]}
    if method == "ddpm":
        down, scale = moves(model, **plan, eta=1.0), about["guidance_scale"]
        latents, noise = ddpm_noise(model, clean, Edit(told, null, scale), down, about["seed"])
        return Trajectory(latents.cpu(), told.to("cpu"), null.to("cpu"), about, noise.cpu())
    up = moves(model, **plan, inverse=True)
    solve = FixedPoint(model, clean, told, about.get("fixed_point", 0))
    run = trajectory(model, clean, Edit(told, guidance_scale=1, hooks=tuple(hooks), latent_edits=(solve,)), up)
    if method == "negative":
        null = told
    elif method == "null-text":
        fit = NullFit(model, run.latents, told, null, about["guidance_scale"], null_text)
        denoise(model, run.latents[-1], Edit(told, fit, about["guidance_scale"]), moves(model, **plan))
        null = Conditioning.cat(fit.rows)
    return Trajectory(run.latents.cpu(), told.to("cpu"), null.to("cpu"), about)


class FixedPoint(LatentEdit):
    """While a picture is inverted, solves each move for the latents whose own prediction leads back.

        z_t ← √ᾱ_t x̂0 + √(1−ᾱ_t) ε(z_t),   x̂0 = (z_{t′} − √(1−ᾱ_{t′}) ε(z_t)) / √ᾱ_{t′},   t′ the lower level

    Args:
        clean: where the first move starts.
        iterations: at each move, from the plain one; 0 leaves it.  Convergence is not guaranteed, but usual.
    """

    def __init__(self, model: StableDiffusion, clean: Tensor, told: Conditioning, iterations: int) -> None:
        self.model, self.below, self.told, self.iterations = model, clean, told, iterations

    def latents(self, z: Tensor, step: Step) -> Tensor:
        below = self.below.to(z)
        for _ in range(self.iterations):
            output = self.model.predict(z, step.timestep, self.told)
            eps = self.model.split(output, z, step.alpha_next)[1]
            z = ddim((below - (1 - step.alpha) ** 0.5 * eps) / step.alpha**0.5, eps, step.alpha_next)
        self.below = z
        return z


def ddpm_noise(model: StableDiffusion, clean: Tensor, edit: Edit, down: Moves, seed: int) -> tuple[Tensor, Tensor]:
    """Edit-friendly DDPM: latents (t+1, 1, c, h, w), clean first, and the noise (t, 1, c, h, w) between them.

    x_t = √ᾱ x_0 + √(1−ᾱ) n_t, n_t independent
    n′_t = (x_{t′} − μ_t(x_t)) / σ_t,    x_{t′} = μ_t + σ_t n′_t
    """
    noisy = [clean]
    for number, move in enumerate(reversed(down.steps)):
        noise = torch.randn(clean.shape, generator=generator(seed, "inversion/ddpm", number)).to(clean)
        noisy.append(move.alpha**0.5 * clean + (1 - move.alpha) ** 0.5 * noise)
    solved = Solved(noisy)
    denoise(model, noisy[-1], _with(edit, solved), with_noise(down, torch.zeros(len(down), *clean.shape)))
    return torch.stack([*reversed(solved.latents_found), noisy[-1]]), torch.stack(solved.noise)


class Solved(LatentEdit):
    """While moves run without noise, finds the noise that would have led to the next of `noisy`, and goes there."""

    def __init__(self, noisy: list[Tensor]) -> None:
        self.noisy = noisy
        self.noise: list[Tensor] = []
        self.latents_found: list[Tensor] = []

    def latents(self, z: Tensor, step: Step) -> Tensor:
        self.noise.append((self.noisy[step.count - 1 - step.index] - z) / step.sigma)
        self.latents_found.append(z + step.sigma * self.noise[-1])
        return self.latents_found[-1]


def _with(edit: Edit, change: LatentEdit) -> Edit:
    return Edit(edit.conditioning, edit.negative, edit.guidance_scale, latent_edits=(change,))
