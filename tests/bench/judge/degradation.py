"""The defects of generated and compressed pictures, to train the judge on: blur, noise, JPEG, colour, shifts.

Every function takes and returns pixels (b, 3, H, W) in [−1, 1].
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor
from torch.nn.functional import affine_grid, conv2d, grid_sample, interpolate, pad


def degraded(pixels: Tensor, owner: Tensor, rng: Generator) -> tuple[Tensor, Tensor]:
    """Pictures and their `owner` maps (b, H, W), shifted and scaled; then half of the pictures are degraded.

    owner: the number of the object that each pixel belongs to, 0 for none.
    """
    pixels, owner = shifted_and_scaled(pixels, owner, rng)
    out = pixels.clone()
    order = torch.randperm(len(pixels), generator=rng)
    rows = order[: len(order) // 2]
    groups = rows.chunk(6)
    for group in groups[:2]:
        out[group] = blurred(out[group], _uniform(rng, 0.3, 1.1))
    for group in groups[2:4]:
        out[group] = shrunk(out[group], _uniform(rng, 0.5, 0.9))
    chosen = rows[torch.rand(len(rows), generator=rng) < 0.4]
    out[chosen] = compressed(out[chosen], rng)
    chosen = rows[torch.rand(len(rows), generator=rng) < 0.6]
    out[chosen] = tinted(out[chosen], rng)
    chosen = rows[torch.rand(len(rows), generator=rng) < 0.5]
    out[chosen] = noisy(out[chosen], rng)
    return out.clamp(-1, 1), owner


def _uniform(rng: Generator, low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand((), generator=rng))


def shifted_and_scaled(pixels: Tensor, owner: Tensor, rng: Generator) -> tuple[Tensor, Tensor]:
    """Pictures and owner maps shifted by up to 4 % and scaled by up to 8 %, with the border repeated.

    Pictures are interpolated bilinearly, owner maps take the nearest value.
    """
    b = len(pixels)
    theta = torch.zeros(b, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = 1 + 0.08 * (2 * torch.rand(b, generator=rng) - 1)
    theta[:, :, 2] = 0.08 * (2 * torch.rand(b, 2, generator=rng) - 1)
    grid = affine_grid(theta, list(pixels.shape), align_corners=False)
    pixels = grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    labels = grid_sample(owner[:, None].float(), grid, mode="nearest", padding_mode="border", align_corners=False)
    return pixels, labels[:, 0].to(owner.dtype)


def blurred(pixels: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of standard deviation `sigma` pixels."""
    axis = torch.arange(-3, 4, dtype=torch.float32)
    kernel = torch.exp(-(axis**2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, 7)
    pixels = conv2d(pad(pixels, (3, 3, 0, 0), mode="replicate"), kernel, groups=3)
    return conv2d(pad(pixels, (0, 0, 3, 3), mode="replicate"), kernel.transpose(2, 3), groups=3)


def shrunk(pixels: Tensor, factor: float) -> Tensor:
    """Resampled to `factor` of the size and back."""
    side = pixels.shape[-1]
    small = interpolate(pixels, size=round(factor * side), mode="bilinear", antialias=True, align_corners=False)
    return interpolate(small, size=side, mode="bicubic", align_corners=False)


def noisy(pixels: Tensor, rng: Generator) -> Tensor:
    """White noise of standard deviation up to 0.1 (5 % of the range)."""
    strength = 0.1 * torch.rand(len(pixels), 1, 1, 1, generator=rng)
    return pixels + strength * torch.randn(pixels.shape, generator=rng)


def tinted(pixels: Tensor, rng: Generator) -> Tensor:
    """Contrast, brightness and colour balance off by up to about 6 %."""
    gain = 1 + 0.12 * (torch.rand(len(pixels), 3, 1, 1, generator=rng) - 0.5)
    offset = 0.12 * (torch.rand(len(pixels), 3, 1, 1, generator=rng) - 0.5)
    return gain * pixels + offset


def compressed(pixels: Tensor, rng: Generator) -> Tensor:
    """The losses of JPEG, without writing a file: 8×8 cosine blocks of luma and chroma, rounded.

    The rounding step grows with the frequency, is twice as coarse for chroma, and has a random strength per picture.
    """
    b, _, height, width = pixels.shape
    colours = torch.tensor([[0.299, 0.587, 0.114], [-0.169, -0.331, 0.5], [0.5, -0.419, -0.081]])
    basis = _cosines()
    blocks = torch.einsum("kc,bchw->bkhw", colours, pixels).reshape(b, 3, height // 8, 8, width // 8, 8)
    spectrum = torch.einsum("ui,bkyixj,vj->bkyuxv", basis, blocks, basis)
    frequency = torch.arange(8.0)
    step = 0.1 + 0.055 * (frequency[:, None] + frequency)
    strength = 0.3 + 1.7 * torch.rand(b, 1, 1, 1, 1, 1, generator=rng)
    step = strength * step[:, None, :] * torch.tensor([1.0, 2.0, 2.0]).reshape(3, 1, 1, 1, 1)
    blocks = torch.einsum("ui,bkyuxv,vj->bkyixj", basis, (spectrum / step).round() * step, basis)
    return torch.einsum("ck,bkhw->bchw", torch.linalg.inv(colours), blocks.reshape(b, 3, height, width))


def _cosines() -> Tensor:
    """The matrix (8, 8) of the orthonormal cosine transform of 8 samples."""
    k, n = torch.arange(8.0)[:, None], torch.arange(8.0)
    basis = torch.cos(math.pi / 8 * (n + 0.5) * k) * math.sqrt(2 / 8)
    basis[0] /= math.sqrt(2)
    return basis
