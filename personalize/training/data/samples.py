"""Training samples of encoded pictures, and how the samples of an update are divided over processes and batches.

A sample is identified by (update, index): `index` counts 0 … N−1 over all N samples of an update, across processes and
batches.  Everything random in it depends on the seed and on these two numbers alone, so that one batch of 10, ten
batches of 1, several processes and a resumed run all see the same samples.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, groupby, pairwise
from typing import Any

import torch
from torch import Tensor

from personalize.errors import UserError
from personalize.models.transfer import sent
from personalize.randomness import generator


@dataclass(frozen=True)
class Chunk:
    """The sample `indices` of one batch, and their `share` in the loss of the update.

    The loss of an update is the mean over all its batches of share · (mean over the batch's samples); the share is
    b · (number of batches) / samples, so that every sample counts the same whatever batch it is in.  It is 0 where a
    process only waits for the others.
    """

    indices: tuple[int, ...]
    share: float = 1.0


@dataclass(frozen=True)
class SampleShard:
    """The `samples` of an update, and which of them process number `process` of `processes` takes.

    batch: most samples at a time; all if None.
    """

    samples: int
    batch: int | None = None
    process: int = 0
    processes: int = 1

    @staticmethod
    def of(config: Any, process: int = 0, processes: int = 1) -> SampleShard:
        """The shard of a training configuration.

        Raises:
            UserError: samples_per_update is given, and train_batch_size · gradient_accumulation_steps · processes is
                another number.
        """
        batch, steps = config.train_batch_size, config.gradient_accumulation_steps
        samples = config.update_samples(processes)
        if None not in (steps, config.samples_per_update) and batch * steps * processes != samples:
            raise UserError(_misfit(samples, batch, steps, processes))
        # a run of fewer samples than an update has is one update of them all
        samples = min(samples, getattr(config, "max_train_samples", None) or samples)
        return SampleShard(samples, batch, process, processes)

    def __str__(self) -> str:
        """`An update: 8 samples, at most 2 at a time in 2 batches on each of 2 processes`."""
        batches, most = self.accumulation, self.largest
        where = f" on each of {self.processes} processes" if self.processes > 1 else ""
        equal = most * batches * self.processes == self.samples
        how = f"{most} at a time" if batches == 1 and equal else f"at most {most} at a time"
        how += f" in {batches} batches" if batches > 1 else ""
        return f"An update: {self.samples} sample{'s' * (self.samples > 1)}, {how}{where}"

    @property
    def largest(self) -> int:
        """The number of samples in the largest batch of all processes, if all samples may share one."""
        return max(len(batch) for batches in self._dealt([0] * self.samples) for batch in batches)

    @property
    def accumulation(self) -> int:
        """The number of batches per update and process, if all samples may share one."""
        return len(self.chunks())

    def updates(self, samples: int) -> int:
        """The number of whole updates that `samples` make; UserError if it is 0."""
        count = samples // self.samples
        if count < 1:
            raise UserError(
                f"{samples} samples in all are less than one update of {self.samples} samples: raise "
                "--max_train_samples, or lower --samples_per_update"
            )
        return count

    def chunks(self, kinds: Sequence[Any] | None = None) -> list[Chunk]:
        """This process's batches of one update, each of samples of one kind; all processes have as many.

        kinds: of each sample, e.g. the size of its picture; by default all are alike.
        """
        dealt = self._dealt([0] * self.samples if kinds is None else kinds)
        count = max(map(len, dealt))
        own = dealt[self.process]
        scale = count * self.processes / self.samples
        waiting = [Chunk(own[0] if own else (0,), 0.0)] * (count - len(own))
        return [*waiting, *(Chunk(batch, len(batch) * scale) for batch in own)]

    def _dealt(self, kinds: Sequence[Any]) -> list[list[tuple[int, ...]]]:
        """The batches of each process, which may have none."""
        order = sorted(range(self.samples), key=lambda index: kinds.index(kinds[index]))  # stable: kind by kind
        bounds = [self.samples * number // self.processes for number in range(self.processes + 1)]
        return [self._batches(order[low:high], kinds) for low, high in pairwise(bounds)]

    def _batches(self, indices: Sequence[int], kinds: Sequence[Any]) -> list[tuple[int, ...]]:
        """`indices`, which are ordered by kind, in batches of one kind that are as equal in size as possible."""
        batches = []
        for _, members in groupby(indices, key=lambda index: kinds[index]):
            alike = tuple(members)
            count = -(-len(alike) // (self.batch or len(alike)))
            bounds = [len(alike) * number // count for number in range(count + 1)]
            batches += [alike[low:high] for low, high in pairwise(bounds)]
        return batches


def _misfit(samples: int, batch: int, steps: int, processes: int) -> str:
    """The message of a layout that cannot keep the size of an update, with those that can."""
    each, rest = divmod(samples, processes)
    fitting = [f"{each // count} × {count}" for count in range(1, each + 1) if each % count == 0] if not rest else []
    layouts = f"--train_batch_size × --gradient_accumulation_steps = {', '.join(fitting)}, " if fitting else ""
    return (
        f"train_batch_size {batch} × gradient_accumulation_steps {steps} × {processes} process{'es' * (processes > 1)} "
        f"is {batch * steps * processes} samples, but samples_per_update is {samples}: leave out "
        f"--gradient_accumulation_steps, use {layouts}or say --samples_per_update {batch * steps * processes}"
    )


class Dataset(ABC):
    """A source of training batches."""

    @abstractmethod
    def updates(self, shard: SampleShard, first: int, last: int) -> Iterator[list[dict[str, Any]]]:
        """This process's batches of each of the updates `first` … `last` − 1."""

    def batches(self, shard: SampleShard, first: int, last: int) -> Iterator[dict[str, Any]]:
        """The batches of `updates`, one after the other."""
        return chain.from_iterable(self.updates(shard, first, last))


@dataclass(frozen=True)
class LatentDataset(Dataset):
    """Training samples of p pictures, encoded once: the posteriors' `mean` and `std`, p times (c, h, w), scaled.

    The pictures may differ in size; each batch is of pictures of one size.

    The latents of a sample are z₀ = mean + std · ξ with ξ ~ N(0, 1), drawn once for each picture, or for each sample
    if `resample`.

    rows: for each picture the row of its caption in the source embedding.
    weights: weight of the loss by position, p times (1, h, w); None: 1 everywhere.
    prior: class pictures in each of the sizes; every batch then ends with as many samples of these as it has of the
        pictures themselves.
    time_ids: SDXL's size conditioning of each picture, p times (6); None for other bases.
    empty_prompts: share of the samples that are `dropped` (), which have no caption; None: no sample says whether.
    purpose: part of the key of the random numbers, so that class pictures draw others than the subject's pictures.
    """

    mean: Sequence[Tensor] | Tensor
    std: Sequence[Tensor] | Tensor
    seed: int
    resample: bool = False
    train_timesteps: int = 1000
    rows: tuple[int, ...] = (0,)
    weights: Sequence[Tensor] | Tensor | None = None
    prior: tuple[LatentDataset, ...] = ()
    purpose: str = ""
    time_ids: Sequence[Tensor] | None = None
    empty_prompts: float | None = None

    def __len__(self) -> int:
        return len(self.mean)

    def sample(self, update: int, index: int, picture: int = 0) -> dict[str, Tensor]:
        """Sample `index` of `update`, made of picture number `picture`.

        It has `latents` and `noise` (c, h, w), `timesteps` () in [0, train_timesteps), `rows` (), and `weights`
        (1, h, w) and `time_ids` (6) if the data set has them.
        """
        batch = self._stacked([(update, index, picture)])
        return {name: part[0] for name, part in batch.items()}

    def _drawn(self, update: int, index: int, picture: int) -> dict[str, Tensor]:
        """What is random in a sample, and the row of its caption, on the CPU."""
        rng, shape = generator(self.seed, f"{self.purpose}noise", update, index), self.mean[picture].shape
        row = {
            "timesteps": torch.randint(self.train_timesteps, (), generator=rng),
            "noise": torch.randn(shape, generator=rng),
            "rows": torch.tensor(self.rows[picture]),
        }
        if self.resample:
            draw = generator(self.seed, f"{self.purpose}posterior", update, index)
            row["drawn"] = torch.randn(shape, generator=draw)
        if self.empty_prompts is not None:
            chance = torch.rand((), generator=generator(self.seed, f"{self.purpose}caption dropout", update, index))
            row["dropped"] = chance < self.empty_prompts
        return row

    @cached_property
    def _latents(self) -> list[Tensor]:
        """The latents of each picture, where they are drawn once."""
        drawn = []
        for picture, (mean, std) in enumerate(zip(self.mean, self.std, strict=True)):
            draw = generator(self.seed, f"{self.purpose}posterior", 0, picture)
            drawn.append(mean + std * torch.randn(mean.shape, generator=draw).to(mean))
        return drawn

    def _stacked(self, samples: Sequence[tuple[int, int, int]]) -> dict[str, Tensor]:
        """The samples (update, index, picture) along b: drawn on the CPU, and sent to the pictures' device at once.

        `rows` stay on the CPU, where captions are read.
        """
        pictures = [picture for _, _, picture in samples]
        drawn = [self._drawn(*sample) for sample in samples]
        mean = torch.stack([self.mean[picture] for picture in pictures])
        batch = {name: torch.stack([row[name] for row in drawn]) for name in drawn[0]}
        batch = {name: part if name == "rows" else sent(part, mean.device) for name, part in batch.items()}
        if self.resample:
            std = torch.stack([self.std[picture] for picture in pictures])
            latents = mean + std * batch.pop("drawn").to(mean)
        else:
            latents = torch.stack([self._latents[picture] for picture in pictures])
        batch = {"latents": latents, "noise": batch.pop("noise").to(mean), **batch}
        for name, parts in (("weights", self.weights), ("time_ids", self.time_ids)):
            if parts is not None:
                batch[name] = torch.stack([parts[picture] for picture in pictures])
        return batch

    def updates(self, shard: SampleShard, first: int, last: int) -> Iterator[list[dict[str, Tensor]]]:
        """This process's batches of each of the updates `first` … `last` − 1, stacked along b.

        The pictures take turns, also from one update to the next.  A batch whose samples do not have the share 1 in
        the update's loss has this as `share` (b,).
        """
        for update in range(first, last):
            pictures = [(update * shard.samples + index) % len(self) for index in range(shard.samples)]
            chunks = shard.chunks([self.mean[picture].shape for picture in pictures])
            yield [self._batch(update, chunk, shard.samples) for chunk in chunks]

    def _batch(self, update: int, chunk: Chunk, samples: int) -> dict[str, Tensor]:
        batch = self._samples(update, chunk.indices, samples)
        for prior in self.prior:
            if prior.mean[0].shape == batch["latents"].shape[1:]:
                more = prior._samples(update, chunk.indices, samples)
                batch = {name: torch.cat([part, more[name]]) for name, part in batch.items()}
        if chunk.share == 1:
            return batch
        latents = batch["latents"]
        return batch | {"share": torch.full((len(latents),), chunk.share, dtype=latents.dtype, device=latents.device)}

    def _samples(self, update: int, indices: Sequence[int], samples: int) -> dict[str, Tensor]:
        return self._stacked([(update, index, (update * samples + index) % len(self)) for index in indices])
