"""Which modules of a model are LoRA layers, without importing peft to ask."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TypeGuard

from torch import nn

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer


def is_lora_layer(module: nn.Module) -> TypeGuard[LoraLayer]:
    """Whether `module` is one of peft's LoRA layers, ours included; there are none before peft is imported."""
    layers = sys.modules.get("peft.tuners.lora.layer")
    return layers is not None and isinstance(module, layers.LoraLayer)
