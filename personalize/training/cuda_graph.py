"""One training update as a CUDA graph: forward pass, backward pass and AdamW replayed without the host taking part.

A graph replays the same operations on the same memory, so the update must have one shape and no branches.  All samples
of the run are therefore drawn beforehand and kept on the device, where a counter selects those of the next update.  A
loss or gradient that is NaN or infinite sets a flag under which AdamW changes nothing; the host reads the flag after
each update and stops the run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from personalize.errors import UserError
from personalize.models.cuda_graphs import WARM, called_on, recorded
from personalize.training.data.samples import SampleShard
from personalize.training.finite import ADVICE, NonFiniteError, step_on_device
from personalize.training.loop import StepReport


class GraphedStep:
    """A training update without arguments, results or branches, all of whose tensors stay where they are in memory.

    Args:
        objective: module whose `forward(batch)` returns `LossTerms`.
        batches: all batches of the run, of one shape, `accumulation` of them to an update.
        optimizer: fused AdamW; on CUDA a capturable one.
        max_grad_norm: clip the gradient to this norm.

    Attributes:
        samples: the batches by name, each (updates, accumulation, b, …).
        count: number of finished updates, (1).
        losses: the loss of each update, NaN before it was made.
        stopped: 0, or 1 from the first update on whose loss or gradient is not finite.
    """

    def __init__(
        self,
        objective: nn.Module,
        batches: Iterable[dict[str, Tensor]],
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        *,
        accumulation: int = 1,
        max_grad_norm: float | None = None,
    ) -> None:
        rows = list(batches)
        self.objective, self.optimizer, self.max_grad_norm = objective, optimizer, max_grad_norm
        self.accumulation = accumulation
        joined = {name: torch.stack([row[name] for row in rows]).to(device) for name in rows[0]}
        self.samples = {name: batch.unflatten(0, (-1, accumulation)) for name, batch in joined.items()}
        self.count = torch.zeros(1, dtype=torch.long, device=device)
        self.losses = torch.full((len(rows) // accumulation,), torch.nan, device=device)
        self.stopped = torch.zeros((), device=device)
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def __len__(self) -> int:
        """The number of updates."""
        return len(self.losses)

    def __call__(self) -> None:
        """Make the next update; once `stopped` is set, the weights stay as they are."""
        batches = {name: rows.index_select(0, self.count).squeeze(0) for name, rows in self.samples.items()}
        total = torch.zeros_like(self.losses[0])
        for micro in range(self.accumulation):
            loss = self.objective({name: rows[micro] for name, rows in batches.items()}).total
            (loss / self.accumulation).backward()
            total = total + loss.detach()
        loss = total / self.accumulation
        grads = [p.grad for p in self.parameters if p.grad is not None]
        norm = get_total_norm(grads)
        self.stopped.logical_or_(~(norm.isfinite() & loss.isfinite()))
        step_on_device(self.optimizer, grads, norm, self.max_grad_norm, self.stopped)
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.index_copy_(0, self.count, loss[None])
        self.count += 1


def graphed_steps(
    objective: nn.Module,
    batches: Iterable[dict[str, Tensor]],
    optimizer: torch.optim.Optimizer,
    config: Any,
    *,
    device: torch.device,
    shard: SampleShard,
    autocast: bool,
    first_update: int = 0,
) -> Iterator[StepReport]:
    """Train `objective` on `batches` as `loop.training_steps` does, with every update a replay of one CUDA graph.

    Raises:
        UserError: the settings of `config` (the run's training configuration) do not allow a graph.
    """
    check_capturable(config, device, shard.processes, autocast=autocast)
    rows = list(batches)
    if not rows:  # resumed when all updates were made
        return iter(())
    step = GraphedStep(
        objective, rows, optimizer, device, accumulation=shard.accumulation, max_grad_norm=config.max_grad_norm
    )
    return replay_steps(step, first_update)


def replay_steps(step: GraphedStep, first_update: int = 0) -> Iterator[StepReport]:
    """Make all updates of `step`: on CUDA as replays of one graph, on other devices as plain calls.

    Raises:
        NonFiniteError: a loss or gradient is NaN or infinite; the weights are those of the last finished update.
    """
    update, device = step, step.count.device
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    rates = tuple(float(group["lr"]) for group in step.optimizer.param_groups)
    for number in range(len(step)):
        if number == WARM and stream is not None:
            update = recorded(step, device)
        if number < WARM and stream is not None:
            called_on(stream, step)
        else:
            update()
        if bool(step.stopped):  # waits for the update that was just made
            raise NonFiniteError(f"update {first_update + number + 1}: its loss or a gradient is not finite; {ADVICE}")
        yield StepReport(first_update + number + 1, {"loss": step.losses[number]}, rates)


def check_capturable(config: Any, device: torch.device, processes: int, *, autocast: bool) -> None:
    """UserError, in one line, if a run with these settings cannot be captured as one CUDA graph."""
    shard = SampleShard.of(config)
    obstacles: Sequence[tuple[bool, str]] = (
        (device.type != "cuda", f"needs a CUDA device, this is {device.type}"),
        (processes > 1, "works with one process"),
        (
            len({chunk.share for chunk in shard.chunks()}) > 1,
            f"needs batches of one size: choose a --train_batch_size that divides {shard.samples}",
        ),
        (
            config.lr_scheduler != "constant" or config.lr_warmup_steps > 0,
            "does not go with lr_scheduler or lr_warmup_steps: it repeats the rate of the recorded update",
        ),
        (config.use_8bit_adam, "does not go with use_8bit_adam, which counts its steps on the host"),
        (config.train_text_encoder, "does not go with train_text_encoder, which tokenizes captions on the host"),
        (
            getattr(config, "instance_token", None) is not None,
            "does not go with instance_token, whose captions are tokenized on the host",
        ),
        (config.early_stop_loss is not None, "does not go with early_stop_loss, which decides on the host"),
        (config.torch_compile, "does not go with torch_compile: recording compiled blocks has not been tried on a GPU"),
        (config.gradient_checkpointing, "does not go with gradient_checkpointing, which saves random states"),
        (autocast, "needs mixed_precision bf16 or no, and no load_in_4bit"),
    )
    for hinders, reason in obstacles:
        if hinders:
            raise UserError(f"cuda_graph {reason}")
