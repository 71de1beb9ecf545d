"""Pictures that data tests read."""

from typing import Any

import torch

from personalize.randomness import generator
from personalize.training.data.samples import LatentDataset


def picture(seed: int = 0, **settings: Any) -> LatentDataset:
    mean = torch.randn(1, 4, 8, 8, generator=generator(5, "test picture"))
    return LatentDataset(mean, torch.full_like(mean, 0.1), seed, **settings)
