"""Where a layer computes, if hooks of accelerate or diffusers move its weights there only while it runs."""

from __future__ import annotations

import torch
from torch import nn


def execution_device(layer: nn.Module) -> torch.device:
    """The device on which a layer computes: that of its weights, or where offloading puts them for its forward pass."""
    hook = getattr(layer, "_hf_hook", None)  # accelerate's, of a layer that is offloaded by itself
    if (device := getattr(hook, "execution_device", None)) is not None:
        return torch.device(device)
    registry = getattr(layer, "_diffusers_hook", None)
    group = registry.get_hook("group_offloading") if registry is not None else None
    if group is not None:
        return torch.device(group.group.onload_device)
    return next(layer.parameters()).device
