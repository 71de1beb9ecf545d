"""The whole update as one step of fixed shape, which a CUDA graph can hold: noise to AdamW, and no word to the host.

All samples are drawn beforehand and lie on the device; a counter there says which are next.  A loss or gradient that is
no number sets a flag, under which AdamW changes nothing, so that the host may look after the fact.  Between two replays
the host has nothing to do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from personalize.errors import UserError
from personalize.training import ADVICE, NonFiniteError, StepReport

if TYPE_CHECKING:
    from personalize.learning import SingleImageRun

WARM = 3  # updates made before the capture, on its stream: libraries allocate and choose kernels in the first ones


class GraphedStep:
    """An update without arguments, results or branches: it works on tensors that stay where they are.

    Args:
        objective: whose `forward(batch)` returns `LossTerms`.
        batches: all batches of the run, of one shape, `accumulation` of them to an update.
        optimizer: fused AdamW; on CUDA a capturable one.
        max_grad_norm: clip to this norm.
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
        self.table = {name: batch.unflatten(0, (-1, accumulation)) for name, batch in joined.items()}
        self.count = torch.zeros(1, dtype=torch.long, device=device)
        self.losses = torch.full((len(rows) // accumulation,), torch.nan, device=device)
        self.stopped = torch.zeros((), device=device)  # 1 from the first update that met no number
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def __len__(self) -> int:
        return len(self.losses)

    def __call__(self) -> None:
        """One update; after `stopped` is set, none."""
        batches = {name: rows.index_select(0, self.count).squeeze(0) for name, rows in self.table.items()}
        total = torch.zeros_like(self.losses[0])
        for micro in range(self.accumulation):
            loss = self.objective({name: rows[micro] for name, rows in batches.items()}).total
            (loss / self.accumulation).backward()
            total = total + loss.detach()
        loss = total / self.accumulation
        grads = [p.grad for p in self.parameters if p.grad is not None]
        norm = get_total_norm(grads)
        self.stopped.logical_or_(~(norm.isfinite() & loss.isfinite()))
        if self.max_grad_norm is not None:
            torch._foreach_mul_(grads, (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
        self.optimizer.found_inf = self.stopped  # pyright: ignore
        self.optimizer.step()
        del self.optimizer.found_inf  # pyright: ignore
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.index_copy_(0, self.count, loss[None])
        self.count += 1


def replay(run: SingleImageRun, batches: Iterable[dict[str, Tensor]]) -> Iterator[StepReport]:
    """The updates of `run` on `batches`, as replays of one graph; UserError if its settings do not allow that."""
    autocast = run.accelerator.mixed_precision == "fp16" or "quantisation" in run.base
    check_capturable(run.recipe, run.model.device, run.share.processes, autocast=autocast)
    more = {"max_grad_norm": run.recipe.max_grad_norm, "accumulation": run.share.accumulation}
    step = GraphedStep(run.objective, batches, run.optimizer.optimizer, run.model.device, **more)
    return replayed(step, run.update)


def replayed(step: GraphedStep, first_update: int = 0) -> Iterator[StepReport]:
    """Make all updates of `step`: on CUDA as replays of one graph, elsewhere as calls.

    Raises:
        NonFiniteError: a loss or gradient is no number; the weights are those of the last finished update.
    """
    run = step
    rates = tuple(float(group["lr"]) for group in step.optimizer.param_groups)
    for number in range(len(step)):
        if number == WARM and step.count.device.type == "cuda":
            run = _captured(step)
        if number < WARM and step.count.device.type == "cuda":
            _beside(step)
        else:
            run()
        if bool(step.stopped):  # of an update that is done: the next one has not been asked for
            raise NonFiniteError(f"update {first_update + number + 1}: its loss or a gradient is no number; {ADVICE}")
        yield StepReport(first_update + number + 1, {"loss": step.losses[number]}, rates)


def _beside(step: GraphedStep) -> None:
    """One call on a stream of its own, as CUDA wants it before a capture."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)


def _captured(step: GraphedStep) -> Any:
    """A call that replays the update; capturing carries nothing out."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def check_capturable(config: Any, device: torch.device, processes: int, *, autocast: bool) -> None:
    """UserError, in one line, if a run with these settings cannot be one graph."""
    obstacles: Sequence[tuple[bool, str]] = (
        (device.type != "cuda", f"needs a CUDA device, this is {device.type}"),
        (processes > 1, "works with one process"),
        (config.use_8bit_adam, "does not go with use_8bit_adam, which counts its steps on the host"),
        (config.train_text_encoder, "does not go with train_text_encoder, which reads words on the host"),
        (config.early_stop_loss is not None, "does not go with early_stop_loss, which decides on the host"),
        (config.gradient_checkpointing, "does not go with gradient_checkpointing, which saves random states"),
        (autocast, "needs mixed_precision bf16 or no, and no load_in_4bit"),
    )
    for hinders, reason in obstacles:
        if hinders:
            raise UserError(f"cuda_graph {reason}")
