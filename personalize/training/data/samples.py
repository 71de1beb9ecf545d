"""Training samples of encoded pictures, and how the samples of an update are divided over batches and processes.

A sample is identified by (update, index): `index` counts 0 … N−1 over all N samples of an update, across processes and
batches.  Its timestep and noise depend on the seed and on these two numbers alone, so that one batch of 10, ten batches
of 1, several processes and a resumed run all see the same samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from personalize.errors import UserError
from personalize.io.images import IMAGE_SUFFIXES
from personalize.randomness import generator


def find_picture(path: str | Path) -> Path:
    """The picture file at `path`: the file itself, or the only picture in a folder.

    Raises:
        UserError: nothing there, or a folder with no picture or with several.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; check the path of the picture")
    if path.is_file():
        return path
    pictures = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())
    if len(pictures) != 1:
        names = ", ".join(picture.name for picture in pictures[:3]) or "none"
        raise UserError(f"{path} must hold exactly one picture, found {len(pictures)} ({names}): name the file itself")
    return pictures[0]


@dataclass(frozen=True)
class SampleShard:
    """This process's part of an update's samples: `accumulation` batches of `batch` samples on each of `processes`."""

    batch: int
    accumulation: int = 1
    process: int = 0
    processes: int = 1

    @property
    def samples(self) -> int:
        """The number of samples of one update, over all processes."""
        return self.batch * self.accumulation * self.processes

    def updates(self, max_train_samples: int) -> int:
        """The number of whole updates that `max_train_samples` samples make; UserError if it is 0."""
        count = max_train_samples // self.samples
        if count < 1:
            raise UserError(
                f"max_train_samples {max_train_samples} is less than one update of {self.samples} samples "
                f"({self.batch} × {self.accumulation} accumulated × {self.processes} processes): raise it"
            )
        return count

    def indices(self, micro: int) -> range:
        """The sample indices of this process's batch number `micro` of an update."""
        first = (micro * self.processes + self.process) * self.batch
        return range(first, first + self.batch)


class Dataset(Protocol):
    """A source of training batches."""

    def batches(self, shard: SampleShard, first: int, last: int) -> Iterator[dict[str, Any]]:
        """This process's batches of the updates `first` … `last` − 1."""
        ...


@dataclass(frozen=True)
class LatentDataset:
    """Training samples of p pictures, encoded once: the posteriors' `mean` and `std` (p, c, h, w), scaled.

    The latents of a sample are z₀ = mean + std · ξ with ξ ~ N(0, 1), drawn once for each picture, or for each sample
    if `resample`.

    rows: for each picture the row of its caption in the source embedding.
    weights: weight of the loss by position, (p, 1, h, w); None: 1 everywhere.
    prior: class pictures; every batch then ends with as many samples of these as it has of the pictures themselves.
    purpose: part of the key of the random numbers, so that class pictures draw others than the subject's pictures.
    """

    mean: Tensor
    std: Tensor
    seed: int
    resample: bool = False
    train_timesteps: int = 1000
    rows: tuple[int, ...] = (0,)
    weights: Tensor | None = None
    prior: LatentDataset | None = None
    purpose: str = ""

    def __len__(self) -> int:
        return len(self.mean)

    def sample(self, update: int, index: int, picture: int = 0) -> dict[str, Tensor]:
        """Sample `index` of `update`, made of picture number `picture`.

        It has `latents` and `noise` (c, h, w), `timesteps` () in [0, train_timesteps), `rows` (), and `weights`
        (1, h, w) if the data set has weights.
        """
        rng = generator(self.seed, f"{self.purpose}noise", update, index)
        timestep = torch.randint(self.train_timesteps, (), generator=rng)
        noise = torch.randn(self.mean.shape[1:], generator=rng)
        draw = generator(self.seed, f"{self.purpose}posterior", *((update, index) if self.resample else (0, picture)))
        mean, std = self.mean[picture], self.std[picture]
        row = {
            "latents": mean + std * torch.randn(mean.shape, generator=draw).to(mean),
            "noise": noise.to(mean),
            "timesteps": timestep.to(mean.device),
            "rows": torch.tensor(self.rows[picture]),
        }
        return row if self.weights is None else row | {"weights": self.weights[picture]}

    def batches(self, shard: SampleShard, first: int, last: int) -> Iterator[dict[str, Tensor]]:
        """This process's batches of the updates `first` … `last` − 1, stacked along b; the pictures take turns."""
        for update in range(first, last):
            for micro in range(shard.accumulation):
                indices = shard.indices(micro)
                rows = self._samples(update, indices, shard.samples)
                if self.prior is not None:
                    rows += self.prior._samples(update, indices, shard.samples)
                yield {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def _samples(self, update: int, indices: range, samples: int) -> list[dict[str, Tensor]]:
        return [self.sample(update, index, (update * samples + index) % len(self)) for index in indices]
