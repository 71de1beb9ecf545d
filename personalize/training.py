"""The training loop: one generator for every objective, driven by Accelerate."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from personalize.losses import LossTerms


@dataclass(frozen=True)
class StepReport:
    """What happened in one optimiser update (counted from 1): detached losses and the rates that were used."""

    update: int
    losses: dict[str, Tensor]
    learning_rates: tuple[float, ...]


def fit(
    objective: nn.Module,
    batches: Iterable[dict[str, Tensor]],
    optimizer: torch.optim.Optimizer,
    *,
    accelerator: Accelerator,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    max_grad_norm: float | None = None,
    first_update: int = 0,
) -> Iterator[StepReport]:
    """Train `objective` on `batches`, yielding after each optimiser update.

    `objective`, `optimizer` and `scheduler` must come out of `accelerator.prepare`; `batches` are this process's own.
    The caller's `for` body logs, saves and stops: there are no callbacks.
    """
    update = first_update
    for batch in batches:
        with accelerator.accumulate(objective):
            terms: LossTerms = objective(batch)
            accelerator.backward(terms.total)
            if accelerator.sync_gradients and max_grad_norm is not None:
                accelerator.clip_grad_norm_(objective.parameters(), max_grad_norm)
            rates = tuple(group["lr"] for group in optimizer.param_groups)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if accelerator.sync_gradients:
            if scheduler is not None:
                scheduler.step()
            update += 1
            yield StepReport(update, {"loss": terms.total.detach(), **terms.parts}, rates)
