"""A stage of pretraining: from its checkpoint, or from another stage's weights, to its last update."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from personalize.training import training_steps

LOG_EVERY = 50  # updates
Batch = Callable[[int, range], dict[str, Tensor]]  # of an update, by the numbers of its samples


@dataclass(frozen=True)
class Stage:
    """What a stage is to do; its checkpoint is `<folder>/<name>.pt`."""

    folder: Path
    name: str
    updates: int
    batch_size: int  # samples per update and process
    learning_rate: float  # peak, of AdamW
    warmup: int  # updates
    decays: bool  # the rate falls over the last fifth, linearly to 2 %
    checkpoint_every: int  # updates
    workers: int = 0  # processes that make batches ahead
    begin_with: Path | None = None  # checkpoint whose weights and averages to begin with, if it is there

    @property
    def checkpoint(self) -> Path:
        return self.folder / f"{self.name}.pt"

    def rate(self, update: int) -> float:
        """The rate's factor at `update`."""
        left = max(0.02, (self.updates - update) / (0.2 * self.updates)) if self.decays else 1.0
        return min(1.0, (update + 1) / self.warmup, left)


def run(
    stage: Stage,
    accelerator: Accelerator,
    objective: nn.Module,
    batch: Batch,
    ema: EMAModel | None = None,
) -> None:
    """Train `objective` to the end of `stage` on `batch(update, numbers of this process's samples)`, with exact resume.

    Sample numbers are counted over all processes.  Losses are printed as JSON lines, as means over about 50 updates.
    """
    optimizer = torch.optim.AdamW(
        objective.parameters(), lr=stage.learning_rate, weight_decay=0.01, betas=(0.9, 0.99), fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, stage.rate)
    parts = {"objective": objective, "optimizer": optimizer, "scheduler": schedule, **({"ema": ema} if ema else {})}
    first = _restore(stage, parts)
    prepared, optimizer = accelerator.prepare(objective, optimizer)
    source = DataLoader(_Batches(stage, accelerator, batch, first), batch_size=None, num_workers=stage.workers)
    batches = ({key: value.to(accelerator.device) for key, value in one.items()} for one in source)
    means, started = {}, time.monotonic()
    for report in training_steps(
        prepared, batches, optimizer, accelerator=accelerator, lr_scheduler=schedule, max_grad_norm=1.0,
        first_update=first,
    ):  # fmt: skip
        if ema is not None:
            ema.step(objective.parameters())
        means = {key: 0.98 * means.get(key, float(value)) + 0.02 * float(value) for key, value in report.losses.items()}
        if report.update % LOG_EVERY == 0:
            done = (report.update - first) * stage.batch_size * accelerator.num_processes
            told = {"samples_per_second": round(done / (time.monotonic() - started), 1)}
            told |= {key: round(value, 5) for key, value in means.items()}
            accelerator.print(json.dumps({"stage": stage.name, "update": report.update} | told), flush=True)
        due = report.update % stage.checkpoint_every == 0 or report.update == stage.updates
        if due and accelerator.is_main_process:
            _save(stage, report.update, parts)


class _Batches(Dataset):
    """This process's batches by number, from the first update still to be made; loader workers may make them ahead."""

    def __init__(self, stage: Stage, accelerator: Accelerator, batch: Batch, first: int) -> None:
        self.size, self.batch, self.first, self.left = stage.batch_size, batch, first, stage.updates - first
        self.process, self.processes = accelerator.process_index, accelerator.num_processes

    def __len__(self) -> int:
        return self.left

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        update = self.first + index
        start = (update * self.processes + self.process) * self.size
        return self.batch(update, range(start, start + self.size))


def _save(stage: Stage, update: int, parts: dict[str, Any]) -> None:
    state = {"update": update} | {name: part.state_dict() for name, part in parts.items()}
    partial = stage.checkpoint.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(stage.checkpoint)


def _restore(stage: Stage, parts: dict[str, Any]) -> int:
    """Load the stage's checkpoint and return its update; without one, the weights and averages to begin with."""
    fresh = not stage.checkpoint.is_file()
    path = stage.begin_with if fresh else stage.checkpoint
    if path is None or not path.is_file():
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    for name in {"objective", "ema"} & parts.keys() if fresh else parts:
        parts[name].load_state_dict(state[name])
    return 0 if fresh else state["update"]
