"""An optimizer's state as tensors and plain values for a file, and as another device's optimizer goes on with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

COMPUTED = ("foreach", "fused", "capturable")  # how torch's optimizers compute an update, which depends on the device


def computed_like(optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """`state_dict` with the ways of computing of `optimizer`: those of another device may not work on this one."""
    groups = state_dict["param_groups"]
    if len(groups) != len(optimizer.param_groups):  # does not fit, which loading it says
        return dict(state_dict)
    own = ({name: group[name] for name in COMPUTED if name in group} for group in optimizer.param_groups)
    return {**state_dict, "param_groups": [group | ways for group, ways in zip(groups, own, strict=True)]}


def flattened(state_dict: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as tensors by name "<parameter>/<key>", and everything else as plain values.

    bitsandbytes nests some a level deeper: "<parameter>/<key>/<key>".
    """
    tensors, values = {}, {}

    def walk(path: str, entries: Mapping[Any, Any]) -> None:
        for key, value in entries.items():
            if isinstance(value, Mapping):
                walk(f"{path}{key}/", value)
            else:
                (tensors if isinstance(value, Tensor) else values)[f"{path}{key}"] = value

    walk("", state_dict["state"])
    return tensors, {"values": values, "param_groups": state_dict["param_groups"]}


def unflattened(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict that `flattened` was given."""
    state: dict[Any, Any] = {}
    for name, value in {**tensors, **settings["values"]}.items():
        number, *path, key = name.split("/")
        entries = state.setdefault(int(number), {})
        for part in path:
            entries = entries.setdefault(part, {})
        entries[key] = value
    return {"state": state, "param_groups": settings["param_groups"]}
