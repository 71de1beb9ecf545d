"""The training loop: one generator for every objective, driven by Accelerate."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from personalize.errors import UserError
from personalize.lora import remove_lora
from personalize.losses import LossTerms
from personalize.model import StableDiffusion


def adamw(
    groups: list[dict[str, Any]], device: torch.device, *, use_8bit: bool = False, weight_decay: float = 0.0
) -> torch.optim.Optimizer:
    """AdamW over `groups`, without decay unless they say so; with `use_8bit` its moments take one byte each.

    bitsandbytes keeps tensors of fewer than 4,096 entries in 32 bits.

    Raises:
        UserError: bitsandbytes is not installed.
    """
    if not use_8bit:
        on_cuda = device.type == "cuda"  # where a graph may hold it: its step number lives there
        fused = on_cuda or device.type == "cpu"
        return torch.optim.AdamW(groups, weight_decay=weight_decay, fused=fused, capturable=on_cuda)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise UserError("use_8bit_adam needs the package bitsandbytes: pip install bitsandbytes") from None
    return AdamW8bit(groups, weight_decay=weight_decay)


@contextmanager
def restored(model: StableDiffusion) -> Iterator[None]:
    """Take the adapters away afterwards, and put every `requires_grad` back."""
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
    """What the base's weights have to be turned into for `accelerator`'s precision; None: they stay as they are.

    bf16 weights need no autocast, which casts weights and norms anew in each pass; fp16's overflow needs its fp32.
    """
    wanted = accelerator is not None and accelerator.mixed_precision == "bf16" and model.dtype == torch.float32
    return torch.bfloat16 if wanted else None


def set_autocast(accelerator: Accelerator, wanted: bool) -> None:
    """Let what `accelerator` prepares from now on run in the precision of its weights, if `wanted`."""
    accelerator.autocast_handler = AutocastKwargs(enabled=not wanted)  # pyright: ignore


@contextmanager
def gradient_checkpointing(unet: Any, wanted: bool = True) -> Iterator[None]:
    """Run the body with gradient checkpointing: of each block only the inputs are kept for the backward pass."""
    blocks = [vars(module) for module in unet.modules() if "gradient_checkpointing" in vars(module)]
    before = [{key: block[key] for key in _CHECKPOINTING if key in block} for block in blocks]
    try:
        if wanted:
            unet.enable_gradient_checkpointing()
        yield
    finally:
        for block, values in zip(blocks, before, strict=True):
            for key in _CHECKPOINTING:
                block.pop(key, None)
            block.update(values)


_CHECKPOINTING = ("gradient_checkpointing", "_gradient_checkpointing_func")


class NonFiniteError(UserError):
    """Training met a value that is no number, and stopped before it could touch the weights."""


@dataclass(frozen=True)
class StepReport:
    """What happened in one optimiser update (counted from 1): detached losses and the rates that were used."""

    update: int
    losses: dict[str, Tensor]
    learning_rates: tuple[float, ...]


@dataclass(frozen=True)
class EarlyStop:
    """Stop when an update's loss is under `loss` once more than `samples` samples have been used, of `batch` each."""

    loss: float
    batch: int
    samples: int = 350

    def __call__(self, update: int, loss: Tensor) -> bool:
        """`update` counts the finished ones; the loss is looked at only when it can matter."""
        return update * self.batch > self.samples and float(loss) < self.loss


def training_steps(
    objective: nn.Module,
    batches: Iterable[dict[str, Tensor]],
    optimizer: torch.optim.Optimizer,
    *,
    accelerator: Accelerator,
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    max_grad_norm: float | None = None,
    first_update: int = 0,
    early_stop: EarlyStop | None = None,
) -> Iterator[StepReport]:
    """Train `objective` on `batches`, yielding after each optimiser update.

    `objective`, `optimizer` and `lr_scheduler` must come out of `accelerator.prepare`; `batches` are this process's,
    `accelerator.gradient_accumulation_steps` of them to an update, of equal size.  The reported losses are means over
    those batches.  `early_stop` ends the loop before its update is applied.  The caller's `for` body logs, saves and
    stops: there are no callbacks.

    Raises:
        NonFiniteError: a loss or gradient is NaN or infinite; the weights are those of the last finished update.
    """
    update, sums, losses = first_update, {}, {}
    learns = {name: p for name, p in objective.named_parameters() if p.requires_grad}  # asked once: UNets are large
    accelerator.step = 0  # an accumulation that was broken off before leaves nothing behind
    for batch in batches:
        with accelerator.accumulate(objective):
            terms: LossTerms = objective(batch)
            _add(sums, {"loss": terms.total.detach(), **terms.parts})
            accelerator.backward(terms.total)
            if accelerator.sync_gradients:
                losses = _means(sums, accelerator)
                if early_stop is not None and early_stop(update, losses["loss"]):
                    optimizer.zero_grad(set_to_none=True)
                    return
                _guard(objective, learns, batch, losses["loss"], optimizer, accelerator, max_grad_norm, update + 1)
            rates = tuple(group["lr"] for group in optimizer.param_groups)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if accelerator.sync_gradients:
            if lr_scheduler is not None:
                lr_scheduler.step()
            update, sums = update + 1, {}
            yield StepReport(update, losses, rates)


def _add(sums: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        sums[name] = sums[name] + value if name in sums else value


def _means(sums: dict[str, Tensor], accelerator: Accelerator) -> dict[str, Tensor]:
    """Means over this update's batches and over all processes, which so decide alike."""
    means = {name: value / accelerator.gradient_accumulation_steps for name, value in sums.items()}
    return accelerator.reduce(means, "mean") if accelerator.num_processes > 1 else means  # pyright: ignore


def _guard(
    objective: nn.Module,
    learns: dict[str, nn.Parameter],
    batch: dict[str, Tensor],
    loss: Tensor,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    max_grad_norm: float | None,
    update: int,
) -> None:
    """Unscale and clip the gradients; refuse those that are no numbers, naming the first such tensor.

    With a loss scaler (fp16) an overflow is its business, it skips the update and halves the scale, as long as the
    scale is above 1.
    """
    if not torch.isfinite(loss):
        optimizer.zero_grad(set_to_none=True)
        raise NonFiniteError(f"update {update}: the loss is {loss.item()}, {_cause(objective, batch)}; {ADVICE}")
    named = {name: p.grad for name, p in learns.items() if p.grad is not None}
    accelerator.unscale_gradients(optimizer)
    norm = get_total_norm(named.values())
    if not torch.isfinite(norm):
        bad = next((name for name, grad in named.items() if not torch.isfinite(grad).all()), None)
        overflow = accelerator.scaler is not None and accelerator.scaler.get_scale() > 1
        if bad is not None and not overflow:
            optimizer.zero_grad(set_to_none=True)
            raise NonFiniteError(f"update {update}: the gradient of {bad} is not finite; {ADVICE}")
    elif max_grad_norm is not None:
        parameters = [p for p in learns.values() if p.grad is not None]
        clip_grads_with_norm_(parameters, max_grad_norm, norm)


def _cause(objective: nn.Module, batch: dict[str, Tensor]) -> str:
    """The first tensor that is not finite of those the loss was made of."""
    tensors = {f"the batch's {name}": part for name, part in batch.items() if isinstance(part, Tensor)}
    tensors |= dict(objective.named_parameters())
    bad = (name for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all())
    name = next(bad, None)
    return f"for {name} is not finite" if name else "though all it was made of is finite: the forward pass overflowed"


ADVICE = "nothing was changed by this update: lower --learning_rate, or use --mixed_precision no"
