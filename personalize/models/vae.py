"""The autoencoder in a precision in which it does not overflow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def accurate_vae(vae: Any) -> Iterator[None]:
    """Run the body with `vae` in fp32 if it is in fp16 and its `force_upcast` says that fp16 overflows, as SDXL's does.

    Afterwards its weights are as before: every fp16 number is an fp32 number.
    """
    overflows = vae.dtype == torch.float16 and vae.config.get("force_upcast", False)
    try:
        if overflows:
            vae.to(torch.float32)
        yield
    finally:
        if overflows:
            vae.to(torch.float16)
