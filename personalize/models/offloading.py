"""Where a layer computes, if hooks of accelerate or diffusers move its weights there only while it runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def execution_device(layer: nn.Module, part: nn.Module | None = None) -> torch.device:
    """The device on which a layer computes: that of its weights, or where offloading puts them for its forward pass.

    part: the UNet, autoencoder or text encoder that the layer belongs to, which may be offloaded as a whole.
    """
    for module in (layer, *(() if part is None else (part,))):
        if (device := _offloaded_to(module)) is not None:
            return device
    return next(layer.parameters()).device


def embedding_device(encoder: Any) -> torch.device:
    """Where a text encoder takes token ids."""
    return execution_device(encoder.get_input_embeddings(), encoder)


def offloaded(part: nn.Module) -> bool:
    """Whether accelerate or diffusers move the weights of a part, so that nobody else may."""
    return any(_offloaded_to(module) is not None for module in part.modules())


def _offloaded_to(module: nn.Module) -> torch.device | None:
    hook = getattr(module, "_hf_hook", None)  # accelerate's
    if (device := getattr(hook, "execution_device", None)) is not None:
        return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    registry = getattr(module, "_diffusers_hook", None)
    group = registry.get_hook("group_offloading") if registry is not None else None
    return None if group is None else torch.device(group.group.onload_device)
