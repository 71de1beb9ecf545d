"""The training loop, as one generator for every objective, and the optimizer and contexts it needs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs
from torch import Tensor, nn

from personalize.adapters.lora import remove_lora
from personalize.errors import UserError
from personalize.models.stable_diffusion import StableDiffusion
from personalize.training.config import check_warmup
from personalize.training.finite import DeviceCheck, check_and_clip
from personalize.training.losses import LossTerms


def adamw(
    groups: list[dict[str, Any]], device: torch.device, *, use_8bit: bool = False, weight_decay: float = 0.0
) -> torch.optim.Optimizer:
    """AdamW over the parameter `groups`; a group's own "weight_decay" overrides the argument.

    With `use_8bit` each moment takes one byte instead of four, except in tensors of fewer than 4,096 entries, which
    bitsandbytes keeps in 32 bits.

    Raises:
        UserError: bitsandbytes is not installed.
    """
    if not use_8bit:
        on_cuda = device.type == "cuda"  # there a CUDA graph may hold the optimizer: keep its step count on the device
        fused = on_cuda or device.type == "cpu"
        return torch.optim.AdamW(groups, weight_decay=weight_decay, fused=fused, capturable=on_cuda)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise UserError("use_8bit_adam needs the package bitsandbytes: pip install bitsandbytes") from None
    return AdamW8bit(groups, weight_decay=weight_decay)


def make_lr_scheduler(config: Any, optimizer: torch.optim.Optimizer, updates: int) -> Any:
    """diffusers' learning-rate schedule `config.lr_scheduler` over `updates` updates; it is a function of their number.

    Raises:
        UserError: more warm-up updates than there are updates.
    """
    check_warmup(config, updates)
    name = "constant_with_warmup" if config.lr_scheduler == "constant" else config.lr_scheduler
    from diffusers.optimization import get_scheduler

    return get_scheduler(name, optimizer, num_warmup_steps=config.lr_warmup_steps, num_training_steps=updates)


@contextmanager
def restored(model: StableDiffusion) -> Iterator[None]:
    """Run the body; afterwards remove every adapter from `model`, all gradients, and restore each `requires_grad`."""
    parts = (model.unet, *model.text_encoders)
    flags = [(parameter, parameter.requires_grad) for part in parts for parameter in part.parameters()]
    try:
        yield
    finally:
        for part in parts:
            remove_lora(part)
        for parameter, flag in flags:
            parameter.requires_grad_(flag).grad = None


def training_dtype(model: Any, accelerator: Accelerator | None) -> torch.dtype | None:
    """The dtype to cast the base's weights to for training with `accelerator`; None if they stay as they are.

    An fp32 base is cast once: autocast would cast weights in every pass.  In fp16 the passes run behind autocast, which
    computes in fp32 what overflows in fp16, and the loss is scaled: where nothing scales it, an fp16 base is cast up.
    """
    precision = "no" if accelerator is None else accelerator.mixed_precision
    wanted = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    if model.dtype == torch.float32:
        return wanted if wanted != torch.float32 else None
    return wanted if model.dtype == torch.float16 and wanted != torch.float16 else None


def set_autocast(accelerator: Accelerator, *, enabled: bool) -> None:
    """Switch autocast on or off for the modules that `accelerator` prepares from now on."""
    accelerator.autocast_handler = AutocastKwargs(enabled=enabled)  # pyright: ignore


@dataclass(frozen=True)
class StepReport:
    """The result of one optimizer update (counted from 1): detached losses, and the learning rates that were used.

    check: on a GPU, what is known there of losses and gradients that were not finite; see `DeviceCheck`.
    """

    update: int
    losses: dict[str, Tensor]
    learning_rates: tuple[float, ...]
    check: DeviceCheck | None = None

    def values(self) -> dict[str, float]:
        """The losses as numbers, in one read of the device.

        Raises:
            NonFiniteError: this update or one before was not finite, and changed nothing.
        """
        numbers = torch.stack([loss.float() for loss in (*self.losses.values(), *self._flag())]).tolist()
        if self.check is not None and (first := int(numbers.pop())):
            raise self.check.error(first)
        return dict(zip(self.losses, numbers, strict=True))

    def _flag(self) -> list[Tensor]:
        return [] if self.check is None else [self.check.first]

    def note(self) -> str:
        """The loss, for a line of progress; read from the device."""
        return f"loss {self.values()['loss']:.3f}" if "loss" in self.losses else ""


@dataclass(frozen=True)
class EarlyStop:
    """Stop at the first loss below `loss` after `samples` samples; an update uses `batch` samples."""

    loss: float
    batch: int
    samples: int = 350

    def __call__(self, update: int, loss: Tensor) -> bool:
        """Is it time to stop, after `update` updates?  The loss is read from the device only if it can matter."""
        return update * self.batch > self.samples and float(loss) < self.loss


def training_steps(
    objective: nn.Module,
    updates: Iterable[Sequence[dict[str, Tensor]]],
    optimizer: torch.optim.Optimizer,
    *,
    accelerator: Accelerator,
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    max_grad_norm: float | None = None,
    first_update: int = 0,
    early_stop: EarlyStop | None = None,
) -> Iterator[StepReport]:
    """Train `objective` on the batches of all `updates`, yielding a report after each optimizer update.

    The loss of an update is the mean of the losses of its batches, over all processes.

    An update that the loss scaler of fp16 skips is made again on the same batches at half the scale, and counts once.

    There are no callbacks: the body of the caller's `for` loop logs, saves and stops.

    On CUDA the host reads nothing back: an update that is not finite is found by `StepReport.values`, or at the end.

    Args:
        objective, optimizer, lr_scheduler: as returned by `accelerator.prepare`.
        updates: for each update this process's batches; in every process as many.
        max_grad_norm: clip the gradient to this norm.
        first_update: number of updates that were made before.
        early_stop: ends the loop, without applying the update whose loss it stops at.

    Raises:
        NonFiniteError: a loss or gradient is NaN or infinite; the weights are those of the last finished update.
    """
    trained = {name: p for name, p in objective.named_parameters() if p.requires_grad}  # once: it takes long
    plain: Any = getattr(optimizer, "optimizer", optimizer)
    check: DeviceCheck | None = None
    for update, batches in enumerate(updates, first_update + 1):
        rates, skipped = tuple(group["lr"] for group in optimizer.param_groups), True
        scale = _loss_scale(accelerator)
        while skipped:
            losses = _backward(objective, batches, accelerator)
            if early_stop is not None and early_stop(update - 1, losses["loss"]):
                optimizer.zero_grad(set_to_none=True)
                return
            last, loss = batches[-1], losses["loss"]
            if DeviceCheck.possible(plain, accelerator, loss):
                check = check or DeviceCheck(objective, plain, loss.device)
                grads = [p.grad for p in trained.values() if p.grad is not None]
                check.step(update, last, loss, grads, max_grad_norm)
            else:
                check_and_clip(objective, trained, last, loss, optimizer, accelerator, max_grad_norm, update)
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            before, scale = scale, _loss_scale(accelerator)
            # Accelerate alone does not notice that fused AdamW skips by itself
            skipped = getattr(optimizer, "step_was_skipped", False) or scale < before
        if lr_scheduler is not None:
            lr_scheduler.step()
        yield StepReport(update, losses, rates, check)  # pyright: ignore[reportPossiblyUnboundVariable]
    if check is not None and (first := int(check.first)):
        raise check.error(first)


def _loss_scale(accelerator: Accelerator) -> float:
    """The scale of fp16's losses, which is halved by an overflow; read from the device.  1 where nothing is scaled."""
    return 1.0 if accelerator.scaler is None else accelerator.scaler.get_scale()


def _backward(
    objective: nn.Module, batches: Sequence[dict[str, Tensor]], accelerator: Accelerator
) -> dict[str, Tensor]:
    """Add up the gradients of an update's batches; returns the mean losses over all batches and processes.

    Processes exchange gradients with the last batch only.
    """
    sums: dict[str, Tensor] = {}
    for number, batch in enumerate(batches, 1):
        with nullcontext() if number == len(batches) else accelerator.no_sync(objective):
            terms: LossTerms = objective(batch)
            _add(sums, {"loss": terms.total.detach(), **terms.parts})
            accelerator.backward(terms.total / len(batches))
    means = {name: value / len(batches) for name, value in sums.items()}
    return accelerator.reduce(means, "mean") if accelerator.num_processes > 1 else means  # pyright: ignore


def _add(sums: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        sums[name] = sums[name] + value if name in sums else value
