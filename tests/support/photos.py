"""Tiny models that respond to latents and text roughly as trained ones do, and a picture for them."""

from __future__ import annotations

from functools import cache

import torch
from PIL import Image

from personalize.io.images import to_image
from personalize.models.stable_diffusion import StableDiffusion
from tests.support.tiny import tiny

SOURCE, TARGET = "a red cat on the beach", "a red dog on the beach"
SIZE = (32, 32)  # px; latents are 8×8
SPREAD = {"sd1": 0.05, "sd2v": 0.1, "sdxl": 0.05}


def gentle(name: str = "sd1") -> StableDiffusion:
    """A tiny model with a small output, scaled so that inversion works, on which the text has ten times the effect.

    With plain random weights neighbouring latents would get unrelated predictions, so that inversion gives noise, and
    prompts would hardly have an effect, so that an edit changes nothing.
    """
    model = tiny(name)
    with torch.no_grad():
        for part in (model.unet.conv_out.weight, model.unet.conv_out.bias):
            part.mul_(SPREAD[name])
        for key, parameter in model.unet.named_parameters():
            if key.endswith("attn2.to_out.0.weight"):
                parameter.mul_(10)
    return model


@cache
def shared(name: str = "sd1") -> StableDiffusion:
    """`gentle`, cached, for tests that do not alter the model."""
    return gentle(name)


def smooth() -> torch.Tensor:
    """Pixels (1, 3, 32, 32) in [−1, 1] of smooth waves."""
    x = torch.linspace(-1, 1, SIZE[0])
    r, c = x[:, None], x[None]
    return torch.stack([torch.sin(3 * r + 2 * c), torch.cos(4 * c * r), torch.tanh(2 * r * c)])[None]


def photo(width: int = 32, height: int = 32) -> Image.Image:
    return to_image(smooth()).resize((width, height))


def relative(value: torch.Tensor, expected: torch.Tensor) -> float:
    """The relative error ‖value − expected‖ / ‖expected‖."""
    return float((value - expected).norm() / expected.norm())
