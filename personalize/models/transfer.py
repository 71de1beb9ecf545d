"""Copies to a GPU for which the host does not wait.

Pure: torch alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device | str) -> Tensor:
    """`tensor` on `device`.  From the CPU to CUDA the copy takes place while the host goes on.

    It then is made from memory that the driver can read by itself, which torch keeps until the copy is done.
    """
    device = torch.device(device)
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def on_device(value: Tensor | float, device: torch.device) -> Tensor:
    """A tensor or a number on `device`, where the number is written without a copy."""
    return sent(value, device) if isinstance(value, Tensor) else torch.full((), value, device=device)


def constant(values: float | Sequence[Any], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """`values` as a tensor on the device of `like`, by default with its dtype; one number costs no copy at all."""
    dtype = like.dtype if dtype is None else dtype
    if isinstance(values, int | float):
        return torch.full((), values, dtype=dtype, device=like.device)
    return sent(torch.tensor(values, dtype=dtype), like.device)
