"""One stage of pretraining: updates from the stage's checkpoint, or another stage's weights, to its last update."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader, Dataset

from personalize.training.loop import training_steps

LOG_EVERY = 50  # updates
BatchMaker = Callable[[int, range], dict[str, Tensor]]  # (update, sample numbers) → the batch of these samples


class Restorable(Protocol):
    """What is kept in the checkpoint, such as a moving average of the trained weights."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


@dataclass(frozen=True)
class Stage:
    """How long a stage trains, on how many samples an update, and how often it writes `<folder>/<name>.pt`.

    batch_size: samples per update and process.
    checkpoint_every: updates between two checkpoints.
    workers: processes that make batches ahead.
    begin_with: checkpoint of another stage, whose weights this one starts from, if the file exists.
    """

    folder: Path
    name: str
    updates: int
    batch_size: int
    checkpoint_every: int
    workers: int = 0
    begin_with: Path | None = None

    @property
    def checkpoint(self) -> Path:
        return self.folder / f"{self.name}.pt"


def learning_rate_factor(update: int, *, updates: int, warmup: int, decay: bool) -> float:
    """Share of the peak learning rate at `update`: rises linearly over `warmup` updates (0: none); with `decay` falls.

    The decay is linear, over the last fifth of `updates`, so that the rate after the last one would be 0.
    """
    decayed = max(0.0, (updates - update) / (0.2 * updates)) if decay else 1.0
    return min(1.0, (update + 1) / max(1, warmup), decayed)


def warmup_schedule(optimizer: Optimizer, *, updates: int, warmup: int, decay: bool) -> LRScheduler:
    """The scheduler of `learning_rate_factor`."""
    return LambdaLR(optimizer, partial(learning_rate_factor, updates=updates, warmup=warmup, decay=decay))


def run_stage(
    stage: Stage,
    accelerator: Accelerator,
    objective: nn.Module,
    make_batch: BatchMaker,
    optimizer: Optimizer,
    schedule: LRScheduler,
    *,
    average: Restorable | None = None,
    update_average: Callable[[], Any] = lambda: None,
) -> None:
    """Train `objective` from the stage's checkpoint, if there is one, to its last update; resuming is exact.

    make_batch: makes the batch of an update from the numbers of this process's samples, which are counted over all
        processes and updates.
    average, update_average: a moving average of the weights, and the call that updates it after each update.

    Losses are printed as JSON lines every 50 updates, as moving means over about as many.
    """
    parts = {"objective": objective, "optimizer": optimizer, "scheduler": schedule}
    parts |= {} if average is None else {"ema": average}
    first = _restore(stage, parts)
    prepared, optimizer = accelerator.prepare(objective, optimizer)
    source = DataLoader(_Batches(stage, accelerator, make_batch, first), batch_size=None, num_workers=stage.workers)
    updates = ([{key: value.to(accelerator.device) for key, value in one.items()}] for one in source)
    means, started = {}, time.monotonic()
    for report in training_steps(
        prepared, updates, optimizer, accelerator=accelerator, lr_scheduler=schedule, max_grad_norm=1.0,
        first_update=first,
    ):  # fmt: skip
        update_average()
        means = {key: 0.98 * means.get(key, float(value)) + 0.02 * float(value) for key, value in report.losses.items()}
        if report.update % LOG_EVERY == 0:
            samples = (report.update - first) * stage.batch_size * accelerator.num_processes
            line = {"stage": stage.name, "update": report.update}
            line |= {"samples_per_second": round(samples / (time.monotonic() - started), 1)}
            line |= {key: round(value, 5) for key, value in means.items()}
            accelerator.print(json.dumps(line), flush=True)
        checkpoint_due = report.update % stage.checkpoint_every == 0 or report.update == stage.updates
        if checkpoint_due and accelerator.is_main_process:
            _save(stage, report.update, parts)


class _Batches(Dataset):
    """This process's batches of the updates from `first` on, as a data set that loader workers can read."""

    def __init__(self, stage: Stage, accelerator: Accelerator, make_batch: BatchMaker, first: int) -> None:
        self.stage, self.make_batch, self.first = stage, make_batch, first
        self.process, self.processes = accelerator.process_index, accelerator.num_processes

    def __len__(self) -> int:
        return self.stage.updates - self.first

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        update, size = self.first + index, self.stage.batch_size
        start = (update * self.processes + self.process) * size
        return self.make_batch(update, range(start, start + size))


def _save(stage: Stage, update: int, parts: Mapping[str, Any]) -> None:
    """Write the stage's checkpoint; an interruption leaves the previous one."""
    state = {"update": update} | {name: part.state_dict() for name, part in parts.items()}
    partial = stage.checkpoint.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(stage.checkpoint)


def _restore(stage: Stage, parts: Mapping[str, Any]) -> int:
    """Load the stage's checkpoint and return its update; without one, the weights of `stage.begin_with`, and return 0.

    A moving average starts anew with the stage, from those weights.
    """
    fresh = not stage.checkpoint.is_file()
    path = stage.begin_with if fresh else stage.checkpoint
    if path is None or not path.is_file():
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    for name in ("objective",) if fresh else parts:
        parts[name].load_state_dict(state[name])
    return 0 if fresh else state["update"]
