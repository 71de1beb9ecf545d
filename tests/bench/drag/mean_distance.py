"""The mean distance MD of DragBench: how far from its target the content of a handle is found in the dragged picture.

A handle is found by DIFT features F (d, h, w): what one block of the decoder makes of the noised picture at t = 261,
averaged over eight draws of noise, under the picture's caption, and interpolated to the picture's size:

    p* = argmax_p cos(F_source[handle], F_dragged[p])            MD = mean over handles of ‖p* − target‖, in pixels

The search is over the whole picture, as DragDiffusion and FastDrag do; RegionDrag and Inpaint4Drag search near handle
and target alone and divide by the picture's size, so that their figures are of another kind.  DragBench takes the
features from the second block of Stable Diffusion 2.1, this bench from its own base model: compare arms of one table,
not tables.  The embedded model's third block is read: in the true pictures of five scenes outside of the bench it finds
handles 0.6 px from where they are, the second one 6.0 px (four cells, 128 px).

References: Shi et al., "DragDiffusion", arXiv 2306.14435, for DragBench; Tang et al., "Emergent Correspondence from
Image Diffusion" (DIFT), arXiv 2306.03881.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, interpolate

from personalize.models.stable_diffusion import StableDiffusion
from personalize.randomness import generator
from tests.bench.judge.judge import as_pixels

TIMESTEP, DRAWS, SEED = 261, 8, 42
BLOCK, EMBEDDED_BLOCK = 1, 2


class _Found(Exception):
    """Raised to leave the UNet once the features are there."""


@torch.no_grad()
def dift_features(model: StableDiffusion, picture: np.ndarray, caption: str) -> Tensor:
    """F (d, H, W) of a `picture` (H, W, 3)."""
    latents, kept = model.encode(as_pixels(picture[None])), []

    def keep(module: Any, args: Any, output: Tensor) -> None:
        kept.append(output.float().mean(0, keepdim=True).cpu())
        raise _Found

    shape = (DRAWS, *latents.shape[1:])
    noise = torch.randn(shape, generator=generator(SEED, "bench/dift")).to(latents)
    noisy = model.noised(latents.expand(shape), noise, torch.full((DRAWS,), TIMESTEP))
    handle = model.unet.up_blocks[EMBEDDED_BLOCK if model.name == "embedded" else BLOCK].register_forward_hook(keep)
    try:
        model.predict(noisy, TIMESTEP, model.prompts([caption] * DRAWS, (picture.shape[0], picture.shape[1])))
    except _Found:
        pass
    finally:
        handle.remove()
    return interpolate(kept[0], picture.shape[:2], mode="bilinear")[0]


def matched(source: Tensor, dragged: Tensor, handle: tuple[float, float]) -> tuple[float, float]:
    """The place (x, y) in the features `dragged` (d, H, W) that is most similar to the `handle` (x, y) in `source`."""
    asked = source[:, int(handle[1]), int(handle[0])]
    place = int(cosine_similarity(dragged, asked[:, None, None], dim=0).argmax())
    return float(place % dragged.shape[-1]), float(place // dragged.shape[-1])


def distance_left(
    source: Tensor, dragged: Tensor, handle: tuple[float, float], target: tuple[float, float]
) -> float:  # fmt: skip
    """‖p* − target‖ in pixels, for one handle."""
    return math.dist(matched(source, dragged, handle), target)
