"""Filling what a warped picture does not show: only these cells U are sampled, all others are held at every step.

    z_t[p] = √ᾱ_t z_0[p] + √(1−ᾱ_t) ε[p]        for each cell p outside U, with the same noise ε at every step

Self-attention may look only at cells outside the object's old and new place and of other objects: cells that attend to
an object are drawn like it, and a second object would grow where the first one was.  For the same reason nothing is
asked for by a prompt.

References: Lugmayr et al., "RePaint", arXiv 2201.09865; Avrahami et al., "Blended Latent Diffusion", arXiv 2206.02779;
Rombach et al., arXiv 2112.10752, for UNets with nine input channels: z_t, the mask of U, and z_0 outside U.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from personalize.editing.drag.attention import AttentionRows
from personalize.editing.drag.config import DragSettings
from personalize.editing.drag.fill import attention_means, bnni_fill
from personalize.models.attention import AttentionHook, AttentionSite
from personalize.models.parameterization import noised
from personalize.models.stable_diffusion import StableDiffusion
from personalize.randomness import generator
from personalize.sampling.denoise import Edit, LatentEdit, denoise
from personalize.sampling.schedule import Step, make_schedule


class HeldCells(LatentEdit):
    """Holds the cells outside `free` (h, w) at the noised `clean` latents:  z ← √ᾱ clean + √(1−ᾱ) noise."""

    def __init__(self, clean: Tensor, noise: Tensor, free: Tensor) -> None:
        self.held, self.noise, self.free = clean, noise, free.to(clean.device)

    def latents(self, z: Tensor, step: Step) -> Tensor:
        return torch.where(self.free, z, noised(self.held, self.noise, step.alpha_next))


class AllowedKeys(AttentionHook):
    """Lets self-attention see the cells `allowed` (h, w) alone: all other keys and values are left out.

    A coarser site sees its positions of which at least half is allowed; if there are none, it sees all.
    """

    def __init__(self, allowed: Tensor) -> None:
        self.allowed, self.positions = allowed, dict[tuple[int, int], Tensor]()

    def wants(self, site: AttentionSite) -> bool:
        return not site.cross

    def qkv(self, q: Tensor, k: Tensor, v: Tensor, site: AttentionSite) -> tuple[Tensor, Tensor, Tensor]:
        grid = (site.height, site.width)
        if grid not in self.positions:
            share = interpolate(self.allowed[None, None].float(), grid, mode="area").flatten()
            self.positions[grid] = (share >= 0.5).nonzero()[:, 0].to(k.device)
        kept = self.positions[grid]
        return (q, k[:, :, kept], v[:, :, kept]) if len(kept) else (q, k, v)


@torch.no_grad()
def fill_void(
    model: StableDiffusion, pixels: Tensor, void: Tensor, objects: Tensor, attention: AttentionRows,
    settings: DragSettings,
) -> Tensor:  # fmt: skip
    """The picture `pixels` (3, H, W) in which the pixels `void` (H, W) are filled, (3, H, W); others are decoded.

    Args:
        pixels: the warped picture, in which the void already shows something smooth, so that what the encoder sees
            beside the void does not suffer from what was there.
        objects: mask (H, W) of the objects' old and new places, and of other objects.
        attention: of the source picture, for the fill `attention`.
    """
    clean = model.encode(pixels[None])
    size = (clean.shape[-2], clean.shape[-1])
    free, occupied = cells_touching(void, size), cells_touching(objects, size)
    start = _first_contents(clean, free, ~occupied & ~free, attention, settings)
    noise = torch.randn(clean.shape, generator=generator(settings.seed, "drag/void")).to(clean)
    schedule = make_schedule(model, settings.steps, strength=settings.sampled_share)
    hooks = (AllowedKeys(~occupied & ~free),) if settings.fill_keys == "background" else ()
    edits = (HeldCells(clean, noise, free),) if settings.protect else ()
    nothing = model.prompts([""], (pixels.shape[-2], pixels.shape[-1]))
    edit = Edit(nothing, guidance_scale=1, hooks=hooks, latent_edits=edits)
    with inpainting_inputs(model, free, _known(model, pixels, free)):
        latents = denoise(model, noised(start, noise, schedule.steps[0].alpha), edit, schedule)
    return model.decode(latents)[0].cpu()


def cells_touching(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """The cells (h, w) that contain a pixel of `mask` (H, W)."""
    return interpolate(mask[None, None].float(), size, mode="area")[0, 0] > 0


@contextmanager
def inpainting_inputs(model: StableDiffusion, void: Tensor, known: Tensor) -> Iterator[None]:
    """Let an inpainting UNet read the mask `void` (h, w) and the `known` latents (1, c, h, w) at every prediction.

    A text-to-image UNet reads neither.
    """
    before = model.masked_picture
    if model.inpainting:
        model.masked_picture = torch.cat([void.to(known)[None, None], known], 1)
    try:
        yield
    finally:
        model.masked_picture = before


def _known(model: StableDiffusion, pixels: Tensor, free: Tensor) -> Tensor:
    """The latents of `pixels` (3, H, W) that are grey in the cells `free`; of a text-to-image model, nothing."""
    if not model.inpainting:
        return torch.zeros(())
    blank = interpolate(free[None, None].float(), pixels.shape[-2:], mode="nearest")[0, 0] > 0
    return model.encode((pixels * ~blank)[None])


def _first_contents(
    clean: Tensor, free: Tensor, omega: Tensor, attention: AttentionRows, settings: DragSettings
) -> Tensor:
    """`clean` (1, c, h, w) with the cells `free` as the setting `fill` says, from the cells `omega` (h, w)."""
    if settings.first_fill in ("clone", "smooth") or not bool(free.any()) or not bool(omega.any()):
        return clean
    if settings.first_fill == "bnni":
        return bnni_fill(clean, free)
    cells, filled = free.nonzero(), clean.clone()
    filled[0, :, cells[:, 0], cells[:, 1]] = attention_means(clean, cells, omega, attention.rows, settings.top_k)
    return filled
