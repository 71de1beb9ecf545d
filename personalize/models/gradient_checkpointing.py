"""Gradient checkpointing for the length of a `with` block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_CHECKPOINTING = ("gradient_checkpointing", "_gradient_checkpointing_func")


@contextmanager
def gradient_checkpointing(unet: Any, enabled: bool = True) -> Iterator[None]:
    """Run the body with gradient checkpointing in `unet`, if `enabled`; afterwards its settings are as before.

    Of each block only the inputs are kept for the backward pass, which computes the rest again.
    """
    blocks = [vars(module) for module in unet.modules() if "gradient_checkpointing" in vars(module)]
    before = [{key: block[key] for key in _CHECKPOINTING if key in block} for block in blocks]
    try:
        if enabled:
            unet.enable_gradient_checkpointing()
        yield
    finally:
        for block, values in zip(blocks, before, strict=True):
            for key in _CHECKPOINTING:
                block.pop(key, None)
            block.update(values)
