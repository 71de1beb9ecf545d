"""A quick hash of a UNet, by which an adapter knows its base model."""

from __future__ import annotations

from hashlib import sha256
from typing import Any

import torch
from torch import nn

from personalize.errors import UserError

Hashed = tuple[Any, str]  # which weights the UNet had, and their hash


def hashed_unet(unet: nn.Module, before: Hashed | None) -> Hashed:
    """The hash of `unet`, computed anew only if a weight was replaced or changed since `before`."""
    key = tuple(
        (id(weight), weight.data_ptr(), 0 if weight.is_inference() else weight._version)
        for name, weight in unet.named_parameters() if ".lora_" not in name
    )  # fmt: skip
    return before if before is not None and before[0] == key else (key, unet_hash(unet))


def unet_hash(unet: nn.Module) -> str:
    """SHA-256 of names, shapes and 64 signs of every weight, without adapters.

    Signs survive rounding, so a base has the same hash in fp32, fp16 and bf16.

    Raises:
        UserError: weights that are offloaded layer by layer.
    """
    weights = unet.state_dict().items()
    named = sorted((key.replace("base_layer.", ""), weight) for key, weight in weights if ".lora_" not in key)
    if meta := next((key for key, weight in named if weight.device.type == "meta"), None):
        raise UserError(
            f"the UNet's weights ({meta}, …) are offloaded layer by layer, so that they have no hash: call "
            "pipe.remove_all_hooks() first"
        )
    named = [(key, weight.float() if weight.dtype.itemsize == 1 else weight) for key, weight in named]
    signs = [torch.signbit(w.reshape(-1)[:: max(1, w.numel() // 64)][:64]) for _, w in named]
    total = sha256(repr([(key, tuple(w.shape)) for key, w in named]).encode())
    total.update(torch.cat(signs).cpu().numpy().tobytes())
    return total.hexdigest()
