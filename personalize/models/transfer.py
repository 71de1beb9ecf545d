"""Copies to and from a GPU for which the host does not wait.

Pure: torch alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

FACTORIES = {torch.full, torch.ones, torch.zeros}


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


class HostNumbers(TorchFunctionMode):
    """Inside a `with` block, single numbers that the host knows stay on the CPU, and other copies to a GPU do not wait.

    It is for the steps of diffusers' schedulers, some of which move their noise levels to the latents' device one by
    one and compute with them there (UniPC), or draw noise on the CPU (Euler ancestral, DDPM).  torch computes with a
    tensor of no dimension wherever it is, so that the results are the same: in this thread, a tensor () of the CPU that
    would be moved or made on another device stays, and larger ones are `sent`.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.to and args[0].device.type == "cpu":
            return _moved(*args, **kwargs)
        number = func in FACTORIES and args and args[0] == ()  # torch.ones((), device=…)
        values = func is torch.tensor and not isinstance(args[0], Tensor)
        device = kwargs.get("device")
        if device is None or not (number or values):
            return func(*args, **kwargs)
        made = func(*args, **kwargs | {"device": "cpu"})
        return made if made.ndim == 0 else sent(made, device)


def _moved(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`tensor.to(*args, **kwargs)` of a tensor on the CPU, as `HostNumbers` says."""
    given = [*args, *kwargs.values()]
    device = next((arg.device if isinstance(arg, Tensor) else arg for arg in given if _names_device(arg)), "cpu")
    dtype = next((arg.dtype if isinstance(arg, Tensor) else arg for arg in given if _names_dtype(arg)), tensor.dtype)
    return tensor.to(dtype) if tensor.ndim == 0 else sent(tensor.to(dtype), device)


def _names_device(arg: Any) -> bool:
    return isinstance(arg, str | torch.device | Tensor)


def _names_dtype(arg: Any) -> bool:
    return isinstance(arg, torch.dtype | Tensor)
