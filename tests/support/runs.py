"""A small picture, its caption and settings for training runs of a few updates."""

import pytest
import torch
from torch import Tensor

from personalize.adapters.adapter import Adapter
from personalize.models.stable_diffusion import Conditioning, StableDiffusion
from personalize.randomness import generator
from personalize.training.config import SingleImageConfig
from tests.support.tiny import tiny_sd1

CAPTION = "a photo of a cat on the beach"


SMALL = SingleImageConfig(rank=2, max_train_samples=4, samples_per_update=1, targets="attention", learning_rate=5e-3)


def pixels() -> Tensor:
    coarse = torch.rand(1, 3, 4, 4, generator=generator(3, "test pixels")) * 2 - 1
    return torch.nn.functional.interpolate(coarse, size=(64, 64), mode="bilinear")


@pytest.fixture(scope="module")
def model() -> StableDiffusion:
    return tiny_sd1()


def same(a: Adapter, b: Adapter) -> bool:
    assert set(a.lora) == set(b.lora) and (a.source is None) == (b.source is None)
    rows = [(a.lora[key], b.lora[key]) for key in a.lora]
    rows += [(a.source[key], b.source[key]) for key in a.source or {}]  # type: ignore[index]
    return all(torch.equal(*row) for row in rows)


def probe_loss(model: StableDiffusion, source: Conditioning) -> float:
    """Mean squared error on 16 fixed (t, noise) pairs with t stratified, never used in training."""
    latents = model.encode(pixels()).expand(16, -1, -1, -1)
    noise = torch.randn(latents.shape, generator=generator(99, "probe"))
    t = torch.arange(16) * 62 + 31
    with torch.no_grad():
        output = model.predict(model.noised(latents, noise, t), t, source.repeat(16))
    return float((output - model.target(latents, noise, t)).pow(2).mean())
