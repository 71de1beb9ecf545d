"""The autoencoder in a precision in which it does not overflow, and in pieces that fit into memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from personalize.errors import NonFiniteLatents
from personalize.models.memory import decoding_bytes, free_bytes

TILE = 512  # pixels a side of what is decoded at once, where memory is short


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


def decoding_plan(vae: Any, latents: Tensor, device: torch.device, *, tiled: bool) -> tuple[int, int | None]:
    """How many rows of `latents` to decode at once, and in tiles of how many px a side (None: whole).

    All rows at once if that fits into the free memory, else one by one; in tiles if not even one fits, or if `tiled`.
    """
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    each = decoding_bytes(vae, (latents.shape[-2] * factor, latents.shape[-1] * factor))
    free = free_bytes(device)
    if tiled or (free is not None and each > free):
        return 1, TILE
    return (len(latents) if free is None or each * len(latents) <= free else 1), None


@contextmanager
def tiled_vae(vae: Any, side: int | None) -> Iterator[None]:
    """Run the body while `vae` decodes larger pictures in tiles of `side` px, which overlap by a quarter; None: whole.

    A picture is then a little different, for the normalisation of a tile does not see the others.
    """
    names = ("use_tiling", "tile_sample_min_size", "tile_latent_min_size")
    before = {name: getattr(vae, name) for name in names if hasattr(vae, name)}
    if side is None or len(before) < len(names):
        yield
        return
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    try:
        for name, value in zip(names, (True, side, side // factor), strict=True):
            setattr(vae, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(vae, name, value)


def require_finite(latents: Tensor) -> None:
    """NonFiniteLatents if the picture of `latents` would be black."""
    if not bool(latents.isfinite().all()):
        raise NonFiniteLatents(
            "the picture would be black, because its latents are not finite numbers: lower the guidance scale and "
            "the strengths, or sample in fp32"
        )
