"""Inversion: find the noise from which sampling returns to a given image, by one of six methods.

    ddim       DDIM steps from clean to noisy without guidance; guided sampling drifts away from the image
    direct     ddim, and while sampling the source row is set to the stored latents after every step: exact
    negative   ddim, and sampling with the source prompt as negative prompt, which is sampling without guidance
    null-text  ddim, and a null embedding for each step, fitted so that guided sampling follows the trajectory
    ddpm       independent noisy versions of the image, and the noise of the stochastic steps between them: exact
    none       no inversion: while sampling, the source row is the image with fresh noise, and the target is corrected
               by its error (`virtual_inversion`); for 4 to 12 steps

A DDIM inversion step uses the UNet's prediction at the less noisy latents in place of that at the noisier ones, which
are not known yet. `fixed_point` iterations (not for ddpm) solve for noisier latents from whose own prediction sampling
without guidance leads back.

Each method returns a `Trajectory`, whose `edit`, `start` and `schedule` are the arguments of `denoise`.

References: Song et al., arXiv 2010.02502, eq. 14; Ju et al., "Direct Inversion", arXiv 2310.01506; Miyake et al.,
"Negative-prompt Inversion", arXiv 2305.16807; Mokady et al., arXiv 2211.09794; Huberman-Spiegelglas et al., "An Edit
Friendly DDPM Noise Space", arXiv 2304.06140; Garibi et al., "ReNoise", arXiv 2403.14602, for fixed points.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from personalize.errors import UserError
from personalize.io.progress import part
from personalize.models.attention import AttentionHook
from personalize.models.image_processor import PaddedImage, Picture, as_image
from personalize.models.stable_diffusion import Conditioning, StableDiffusion
from personalize.sampling.config import NULL_TEXT, STRENGTH, NullTextSettings
from personalize.sampling.denoise import Edit, LatentEdit, ddim, denoise, denoise_with_history
from personalize.sampling.null_text import NullFit
from personalize.sampling.schedule import Schedule, Step, make_schedule
from personalize.sampling.trajectory import MANIFEST, Trajectory, fingerprint, fingerprint_hash, with_noise
from personalize.sampling.virtual_inversion import noisy_versions

METHODS = ("direct", "ddim", "negative", "null-text", "ddpm", "none")
GUIDANCE = {"null-text": 7.5, "ddpm": 3.5}  # defaults of the methods that invert with guidance
SPACING = "trailing"  # of the timesteps without inversion: few steps begin at pure noise


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
    null_text: NullTextSettings = NULL_TEXT,
    fixed_point: int = 0,
    resolution: int | None = None,
    hooks: Sequence[AttentionHook] = (),
    beside: Sequence[str] = (),
    folder: str | Path | None = None,
    cache: str | Path | None = None,
) -> Trajectory:
    """Invert `image` under `prompt`, with the adapter and the learned tokens that are applied to `model`.

    Args:
        image: an image of any size, which is scaled to about `resolution`² px (by default the base model's) and
            padded; or pixels (1, 3, H, W) in [−1, 1], which are used as they are.
        prompt: a description of the image.
        steps: number of steps from clean latents to pure noise.
        strength: share of the steps that is carried out, at the clean end; by default 1, and 0.64 for ddpm.
        guidance_scale: for null-text the scale that sampling will use, by default 7.5; for ddpm the scale of the source
            row, by default 3.5; the other methods invert without guidance.
        seed: of the noise of ddpm and none.
        null_text: how null embeddings are fitted.
        fixed_point: fixed-point iterations at each step, each of which costs a UNet prediction; not for ddpm.
        hooks: attention hooks that observe the inversion and change nothing. They are not called if the trajectory is
            read from a folder, nor by ddpm and none.
        beside: prompts that will be sampled together with this one. If one of them has more chunks of 75 tokens, the
            conditioning gets as many.
        folder: where the trajectory is written, or read from if it is there already.
        cache: the same, in a subfolder of `cache` that is named by the hash of the inputs.

    Raises:
        UserError: the method is unknown, fixed-point iterations are asked of ddpm, or the trajectory in `folder` has
            other inputs.
    """
    _require(method, fixed_point)
    given = isinstance(image, Tensor)
    pixels = image if given else PaddedImage.of(model, as_image(image), resolution, enlarge=True).pixels
    size = (pixels.shape[-2], pixels.shape[-1])
    conditioning, null = model.prompts([prompt, *beside], size)[:1], model.null(1, size)
    strength = STRENGTH.get(method, 1.0) if strength is None else strength
    if guidance_scale is None or method not in GUIDANCE:
        guidance_scale = GUIDANCE.get(method, 1.0)
    settings = {"method": method, "steps": steps, "strength": strength, "guidance_scale": guidance_scale}
    settings |= _method_settings(method, seed, fixed_point, null_text)
    about = fingerprint(model, pixels, prompt, conditioning, settings)
    place = Path(folder) if folder else Path(cache) / fingerprint_hash(about)[:16] if cache else None
    if place is not None and (place / MANIFEST).is_file():
        return _stored(place, about)
    trajectory = _invert_latents(model, model.encode(pixels), conditioning, null, about, null_text, hooks)
    if place is not None:
        trajectory.save(place)
    return trajectory


def _stored(place: Path, about: Mapping[str, Any]) -> Trajectory:
    """The trajectory in the folder `place`; UserError if it has other inputs; the base's name does not count."""
    stored = Trajectory.load(place)
    stored.require({name: value for name, value in about.items() if name != "name"}, place)
    return stored


def _method_settings(method: str, seed: int, fixed_point: int, null_text: NullTextSettings) -> dict[str, Any]:
    """The settings that this method uses: others must not change the hash of its inputs."""
    settings: dict[str, Any] = {"seed": seed} if method in ("ddpm", "none") else {}
    settings |= {"spacing": SPACING} if method == "none" else {}
    settings |= {"fixed_point": fixed_point} if fixed_point else {}
    return settings | ({"null_text": null_text.inputs} if method == "null-text" else {})


def _require(method: str, fixed_point: int) -> None:
    if method not in METHODS:
        raise UserError(f"unknown inversion {method!r}: choose one of {', '.join(METHODS)}")
    if fixed_point < 0 or fixed_point and method in ("ddpm", "none"):
        raise UserError(f"{fixed_point} fixed-point iterations of {method}: give 0 or more, and 0 with ddpm and none")


def _invert_latents(
    model: StableDiffusion,
    clean: Tensor,
    conditioning: Conditioning,
    null: Conditioning,
    about: dict,
    null_text: NullTextSettings,
    hooks: Sequence[AttentionHook],
) -> Trajectory:
    method, extent = about["method"], {"steps": about["steps"], "strength": about["strength"]}
    if method == "ddpm":
        down, scale = make_schedule(model, **extent, eta=1.0), about["guidance_scale"]
        with part("Inverting"):
            latents, noise = ddpm_noise(model, clean, Edit(conditioning, null, scale), down, about["seed"])
        return Trajectory(latents.cpu(), conditioning.to("cpu"), null.to("cpu"), about, noise.cpu())
    if method == "none":
        versions = noisy_versions(clean, make_schedule(model, **extent, spacing=about["spacing"]), about["seed"])
        return Trajectory(versions.cpu(), conditioning.to("cpu"), null.to("cpu"), about)
    up = make_schedule(model, **extent, inverse=True)
    solve = FixedPoint(model, clean, conditioning, about.get("fixed_point", 0))
    edit = Edit(conditioning, guidance_scale=1, hooks=tuple(hooks), latent_edits=(solve,))
    with part("Inverting"):
        latents = denoise_with_history(model, clean, edit, up).latents
    if method == "negative":
        null = conditioning
    elif method == "null-text":
        scale = about["guidance_scale"]
        fit = NullFit(model, latents, conditioning, null, scale, null_text)
        with part("Fitting null embeddings"):
            denoise(model, latents[-1], Edit(conditioning, fit, scale), make_schedule(model, **extent))
        null = fit.fitted
    return Trajectory(latents.cpu(), conditioning.to("cpu"), null.to("cpu"), about)


class FixedPoint(LatentEdit):
    """Fixed-point inversion: at each inversion step, iterates to latents whose own prediction leads back.

        z_t ← √ᾱ_t x̂0 + √(1−ᾱ_t) ε(z_t),   x̂0 = (z_{t′} − √(1−ᾱ_{t′}) ε(z_t)) / √ᾱ_{t′},   t′ the less noisy level

    Args:
        clean: the latents at which the first step starts.
        iterations: at each step, starting at the result of the DDIM step; 0 keeps that result. Convergence is usual,
            but not guaranteed.

    References: Garibi et al., arXiv 2403.14602.
    """

    def __init__(self, model: StableDiffusion, clean: Tensor, conditioning: Conditioning, iterations: int) -> None:
        self.model, self.previous, self.conditioning, self.iterations = model, clean, conditioning, iterations

    def latents(self, z: Tensor, step: Step) -> Tensor:
        previous = self.previous.to(z)
        for _ in range(self.iterations):
            output = self.model.predict(z, step.timestep, self.conditioning)
            eps = self.model.split(output, z, step.alpha_next)[1]
            z = ddim((previous - (1 - step.alpha) ** 0.5 * eps) / step.alpha**0.5, eps, step.alpha_next)
        self.previous = z
        return z


def ddpm_noise(model: StableDiffusion, clean: Tensor, edit: Edit, down: Schedule, seed: int) -> tuple[Tensor, Tensor]:
    """Edit-friendly DDPM inversion: noisy latents, and the noise with which stochastic sampling passes through them.

        x_t = √ᾱ x_0 + √(1−ᾱ) n_t, n_t independent
        n′_t = (x_{t′} − μ_t(x_t)) / σ_t,    x_{t′} = μ_t + σ_t n′_t

    Args:
        clean: the encoded image, (1, c, h, w).
        down: a schedule with σ > 0, from noisy to clean.

    Returns:
        The latents (t+1, 1, c, h, w), clean first, and the noise (t, 1, c, h, w) in the order of sampling.
    """
    noisy = noisy_versions(clean, down, seed, "ddpm")
    solver = NoiseSolver(noisy)
    no_noise = with_noise(down, torch.zeros(len(down), *clean.shape))
    denoise(model, noisy[-1], replace(edit, latent_edits=(solver,)), no_noise)
    return torch.stack([*reversed(solver.reached), noisy[-1]]), torch.stack(solver.noise)


class NoiseSolver(LatentEdit):
    """Computes, after each step without noise, the noise that leads to the given latents, and continues from there.

    `noisy` are the given latents from clean to noisy; `noise` and `reached` collect the noise and the latents that it
    leads to, which differ from the given ones by rounding.
    """

    def __init__(self, noisy: Tensor) -> None:
        self.noisy = noisy
        self.noise: list[Tensor] = []
        self.reached: list[Tensor] = []

    def latents(self, z: Tensor, step: Step) -> Tensor:
        self.noise.append((self.noisy[step.count - 1 - step.index] - z) / step.sigma)
        self.reached.append(z + step.sigma * self.noise[-1])
        return self.reached[-1]
