"""Gradients of a loss with a model in fp16, in which small ones would underflow if they were computed as they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

HALF_SCALE = 2.0**12  # factor on the loss in fp16, by which the gradients are divided again


def set_gradients(loss: Tensor, weights: Sequence[Tensor], dtype: torch.dtype) -> None:
    """Set `grad` of each of `weights` to the gradient of `loss`, which a model of `dtype` has computed."""
    scale = HALF_SCALE if dtype == torch.float16 else 1.0
    for weight, gradient in zip(weights, torch.autograd.grad(loss * scale, weights), strict=True):
        weight.grad = gradient / scale
