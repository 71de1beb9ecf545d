"""Losses and gradients that are NaN or infinite: found before they reach the weights, on the host or on the device."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from personalize.errors import UserError

ADVICE = "this update changed nothing: lower --learning_rate, or use --mixed_precision no"


class NonFiniteError(UserError):
    """A loss or gradient was NaN or infinite; training stopped before it changed the weights."""


class DeviceCheck:
    """Whether a loss or gradient was not finite, kept on a CUDA device until somebody looks.

    From the first such update on fused AdamW changes nothing, by a flag that it reads there itself: the host need not
    wait for an update before it prepares the next one.

    first: the number of the first update that was not finite, () in fp32; 0 if there is none.
    """

    def __init__(self, objective: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self.objective, self.optimizer = objective, optimizer
        self.first = torch.zeros((), device=device)
        self._last: tuple[int, dict[str, Any], Tensor] | None = None  # update, its last batch, and its loss

    @staticmethod
    def possible(optimizer: Any, accelerator: Accelerator, loss: Tensor) -> bool:
        """Whether the optimizer reads such a flag.  A loss scaler has one of its own, which the host reads."""
        return loss.device.type == "cuda" and accelerator.scaler is None and bool(optimizer.defaults.get("fused"))

    def step(self, update: int, batch: dict[str, Any], loss: Tensor, grads: list[Tensor], clip: float | None) -> None:
        """Make the update, clipped to the norm `clip`, if all has been finite."""
        norm = get_total_norm(grads)
        bad = ~(norm.isfinite() & loss.isfinite())
        self.first = torch.where((self.first == 0) & bad, float(update), self.first)
        step_on_device(self.optimizer, grads, norm, clip, (self.first > 0).float())
        self._last = update, batch, loss

    def error(self, first: int) -> NonFiniteError:
        """What to raise if update `first` was not finite; with the cause, if it is the last one."""
        if self._last is None or self._last[0] != first:
            return NonFiniteError(f"update {first}: its loss or a gradient is not finite; {ADVICE}")
        _, batch, loss = self._last
        if torch.isfinite(loss):
            return NonFiniteError(f"update {first}: a gradient is not finite; {ADVICE}")
        cause = _nonfinite_cause(self.objective, batch)
        return NonFiniteError(f"update {first}: the loss is {loss.item()}, {cause}; {ADVICE}")


def step_on_device(optimizer: Any, grads: list[Tensor], norm: Tensor, clip: float | None, stopped: Tensor) -> None:
    """An update of fused AdamW, clipped from `norm` to `clip`, that changes nothing where `stopped` (), fp32, is 1."""
    if clip is not None:
        torch._foreach_mul_(grads, (clip / (norm + 1e-6)).clamp(max=1.0))
    optimizer.found_inf = stopped
    optimizer.step()
    del optimizer.found_inf


def check_and_clip(
    objective: nn.Module,
    trained: dict[str, nn.Parameter],
    batch: dict[str, Tensor],
    loss: Tensor,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    max_grad_norm: float | None,
    update: int,
) -> None:
    """Unscale and clip the gradients; raise NonFiniteError, naming the first tensor, if one is NaN or infinite.

    An overflow under a loss scaler (fp16) is no error while the scale is above 1: the scaler then skips the update and
    halves the scale.
    """
    if not torch.isfinite(loss):
        optimizer.zero_grad(set_to_none=True)
        cause = _nonfinite_cause(objective, batch)
        raise NonFiniteError(f"update {update}: the loss is {loss.item()}, {cause}; {ADVICE}")
    named = {name: p.grad for name, p in trained.items() if p.grad is not None}
    accelerator.unscale_gradients(optimizer)
    norm = get_total_norm(named.values())
    if not torch.isfinite(norm):
        bad = next((name for name, grad in named.items() if not torch.isfinite(grad).all()), None)
        overflow = accelerator.scaler is not None and accelerator.scaler.get_scale() > 1
        if bad is not None and not overflow:
            optimizer.zero_grad(set_to_none=True)
            raise NonFiniteError(f"update {update}: the gradient of {bad} is not finite; {ADVICE}")
    elif max_grad_norm is not None:
        parameters = [p for p in trained.values() if p.grad is not None]
        clip_grads_with_norm_(parameters, max_grad_norm, norm)


def _nonfinite_cause(objective: nn.Module, batch: dict[str, Tensor]) -> str:
    """For the message: the first tensor that is not finite among the batch and the parameters."""
    tensors = {f"the batch's {name}": part for name, part in batch.items() if isinstance(part, Tensor)}
    tensors |= dict(objective.named_parameters())
    names = (name for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all())
    name = next(names, None)
    return f"because {name} is not finite" if name else "from finite inputs and weights: the forward pass overflowed"
