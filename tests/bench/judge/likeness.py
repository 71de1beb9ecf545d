"""How alike two pictures of an object are, whatever is around it: is the subject of an edit still the same one?

    likeness = Likeness.load()
    likeness(photo, mask, edited, edited_mask)          # cosine in [−1, 1]: above 0.8 for 95 % of views of one sprite

A small network of its own, trained by `train_likeness.py` on all sprites: it shares no weights with the judge.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, normalize

from tests.bench.judge.judge import Residual, convolution, folded_state, object_crop

WEIGHTS = Path(__file__).with_name("likeness.safetensors")
WIDTHS = (24, 48, 96)  # channels at 32×32, 16×16 and 8×8
DIMENSIONS = 64  # of an embedding


class LikenessNet(nn.Module):
    """Convolutions from crops (b, 3, 64, 64) in [−1, 1] to embeddings (b, 64) of length 1.

    folded: without normalisation layers, for weights into whose convolutions they are folded (`folded_state`).
    """

    def __init__(self, widths: Sequence[int] = WIDTHS, *, folded: bool = False) -> None:
        super().__init__()
        a, b, c = widths
        norm = nn.Identity if folded else nn.BatchNorm2d
        self.trunk = nn.Sequential(
            convolution(3, a, norm, kernel=5, stride=2),
            convolution(a, b, norm, stride=2),
            Residual(b, norm),
            convolution(b, c, norm, stride=2),
            Residual(c, norm),
        )
        self.embedding = nn.Linear(16 * c, DIMENSIONS)

    def forward(self, pixels: Tensor) -> Tensor:
        """Embeddings; what is where counts by quarters of the crop's width and height."""
        features = adaptive_avg_pool2d(self.trunk(2 * pixels).float(), 4)
        return normalize(self.embedding(features.flatten(1)), dim=1)


class Likeness:
    """A loaded network, which compares the objects under masks of two pictures."""

    def __init__(self, net: LikenessNet, info: dict[str, Any]) -> None:
        self.net, self.info = net.eval().requires_grad_(False), info

    @classmethod
    def load(cls, path: str | Path = WEIGHTS) -> Likeness:
        """Read weights written by `save`."""
        with safe_open(path, "pt") as file:
            info = json.loads(file.metadata()["likeness"])
            state = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
        net = LikenessNet(info["widths"], folded=True)
        net.load_state_dict(state)
        return cls(net, info)

    @torch.inference_mode()
    def embed(self, crops: Tensor) -> Tensor:
        """Embeddings (b, 64) of crops (b, 3, 64, 64) as from `object_crop`."""
        return torch.cat([self.net(part) for part in crops.split(256)])

    def __call__(self, first: Any, first_mask: np.ndarray, second: Any, second_mask: np.ndarray) -> float:
        """Cosine of the embeddings of two objects: of `first` under its mask (H, W), and of `second` under its own.

        Raises:
            ValueError: a mask that is empty, or has another size than its picture.
        """
        one, other = self.embed(torch.cat([object_crop(first, first_mask), object_crop(second, second_mask)]))
        return float(one @ other)


def save(net: LikenessNet, path: str | Path, info: dict[str, Any]) -> None:
    """Write `net` in half precision, with the normalisation layers folded in, and `info`, which holds its widths."""
    state = {name: tensor.half().contiguous() for name, tensor in folded_state(net).items()}
    save_file(state, path, {"likeness": json.dumps(info)})
