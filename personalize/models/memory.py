"""Memory: what is free on a device, the peak of the tensors in a block, and what an autoencoder takes for a picture."""

from __future__ import annotations

import ctypes
import json
import re
import sys
import weakref
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PROBE = 16  # latent positions a side: what the autoencoder allocates is in proportion to the picture


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors created while it is active and still alive: `now`, and the maximum, `peak`.

    With `reorders`, the copy too that a convolution on a CPU makes of its input, in an order of its own.
    """

    def __init__(self, known: list[Tensor], *, reorders: bool = False) -> None:
        super().__init__()
        self.reorders = reorders
        self.now = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        if self.reorders and func is torch.ops.aten.convolution.default:
            self.peak = max(self.peak, self.now + args[0].nbytes)
        return out

    def _count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def free_bytes(device: torch.device) -> int | None:
    """Free bytes on `device`, with those that torch keeps for reuse; None where this cannot be found out."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    meminfo = Path("/proc/meminfo")  # Linux
    if device.type != "cpu" or not meminfo.is_file():
        return None
    match = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())
    return int(match[1]) * 1024 if match else None


def return_free_blocks() -> None:
    """Return the free blocks of the C heap to the system, as far as the C library can: glibc, which changes nothing."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def encoding_bytes(vae: Any, size: tuple[int, int]) -> int:
    """The most bytes at once that `vae` allocates to encode one picture of `size` (H, W) in pixels, in fp32."""
    return round(_by_pixel(json.dumps(dict(vae.config)), False, vae.device.type == "cpu") * size[0] * size[1])


def decoding_bytes(vae: Any, size: tuple[int, int]) -> int:
    """The most bytes at once that `vae` allocates to decode one picture of `size` (H, W) in pixels, in fp32."""
    return round(_by_pixel(json.dumps(dict(vae.config)), True, vae.device.type == "cpu") * size[0] * size[1])


@cache
def _by_pixel(config: str, decode: bool, on_cpu: bool) -> float:
    """Bytes by pixel, counted on a copy of the autoencoder that has shapes alone and computes nothing."""
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        vae: Any = AutoencoderKL.from_config(json.loads(config)).eval().requires_grad_(False)  # pyright: ignore
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        latents = torch.empty(1, vae.config.latent_channels, PROBE, PROBE)
        pixels = torch.empty(1, vae.config.in_channels, PROBE * factor, PROBE * factor)
    with torch.no_grad(), LiveBytes([*vae.parameters(), latents, pixels], reorders=on_cpu) as live:
        vae.decode(latents) if decode else vae.encode(pixels)
    return live.peak / (PROBE * factor) ** 2
