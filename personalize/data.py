"""Training samples: where a picture is, latents of one or several, and the noise of every sample.

A sample is known by (update, index): `index` counts 0 … N−1 over all N samples of an update, whichever process and
micro-batch they fall to.  Its timestep and noise depend on the seed and on these two numbers alone, so that one batch
of 10, ten batches of 1, several processes and a resumed run all see the same samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from personalize.errors import UserError
from personalize.images import IMAGE_SUFFIXES
from personalize.randomness import generator


def find_picture(place: str | Path) -> Path:
    """The picture file at `place`: the file itself, or the only picture in a folder.

    Raises:
        UserError: nothing there, or a folder with no picture or with several.
    """
    place = Path(place)
    if not place.exists():
        raise UserError(f"{place}: no such file or folder; check the path of the picture")
    if place.is_file():
        return place
    pictures = sorted(path for path in place.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    if len(pictures) != 1:
        found = ", ".join(path.name for path in pictures[:3]) or "none"
        raise UserError(f"{place} must hold exactly one picture, found {len(pictures)} ({found}): name the file itself")
    return pictures[0]


@dataclass(frozen=True)
class SampleShard:
    """How an update's samples are dealt out: batches of `batch`, `accumulation` of them, on each of `processes`."""

    batch: int
    accumulation: int = 1
    process: int = 0
    processes: int = 1

    @property
    def samples(self) -> int:
        """Samples of one update, over all processes."""
        return self.batch * self.accumulation * self.processes

    def updates(self, max_train_samples: int) -> int:
        """Updates that `max_train_samples` allow: samples // samples per update.  UserError if there is none."""
        count = max_train_samples // self.samples
        if count < 1:
            raise UserError(
                f"max_train_samples {max_train_samples} is less than one update of {self.samples} samples "
                f"({self.batch} × {self.accumulation} accumulated × {self.processes} processes): raise it"
            )
        return count

    def indices(self, micro: int) -> range:
        """Sample indices of this process's batch number `micro` of an update."""
        first = (micro * self.processes + self.process) * self.batch
        return range(first, first + self.batch)


@dataclass(frozen=True)
class LatentDataset:
    """The cached posteriors of p encoded pictures: `mean` and `std` (p, c, h, w), scaled.

    z₀ = mean + std · ξ with one ξ a picture for the whole run, or a new one for each sample if `resample`.

    rows: for each picture the row of the objective's table of captions.
    weights: how much the loss counts where, (p, 1, h, w), or None: everywhere alike.
    prior: class pictures; then every batch has as many of their samples again, behind its own.
    purpose: keeps the random numbers of these pictures apart from those of others.
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

    def sample(self, update: int, index: int, number: int = 0) -> dict[str, Tensor]:
        """Sample `index` of `update`, of picture `number`.

        `latents` and `noise` (c, h, w), `timesteps` () in [0, train_timesteps), `rows` (), and `weights` (1, h, w) if
        there are any.
        """
        rng = generator(self.seed, f"{self.purpose}noise", update, index)
        timestep = torch.randint(self.train_timesteps, (), generator=rng)
        noise = torch.randn(self.mean.shape[1:], generator=rng)
        draw = generator(self.seed, f"{self.purpose}posterior", *((update, index) if self.resample else (0, number)))
        mean, std = self.mean[number], self.std[number]
        row = {
            "latents": mean + std * torch.randn(mean.shape, generator=draw).to(mean),
            "noise": noise.to(mean),
            "timesteps": timestep.to(mean.device),
            "rows": torch.tensor(self.rows[number]),
        }
        return row if self.weights is None else row | {"weights": self.weights[number]}

    def batches(self, share: SampleShard, first: int, last: int) -> Iterator[dict[str, Tensor]]:
        """This process's batches of updates `first` … `last` − 1, stacked along b; the pictures take turns."""
        for update in range(first, last):
            for micro in range(share.accumulation):
                indices = share.indices(micro)
                rows = self._turns(update, indices, share.samples)
                if self.prior is not None:
                    rows += self.prior._turns(update, indices, share.samples)
                yield {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def _turns(self, update: int, indices: range, samples: int) -> list[dict[str, Tensor]]:
        return [self.sample(update, index, (update * samples + index) % len(self)) for index in indices]
