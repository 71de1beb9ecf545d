"""Random numbers keyed by what they are for, never drawn from global state."""

from __future__ import annotations

from hashlib import blake2b

import torch


def generator(seed: int, purpose: str, update: int = 0, sample: int = 0) -> torch.Generator:
    """A fresh CPU generator that depends on (`seed`, `purpose`, `update`, global `sample` index) and nothing else.

    The same four values give the same numbers on every machine, whatever was drawn before: this is what makes
    resuming, gradient accumulation and several processes equal to one unbroken run.
    """
    key = f"{seed}/{purpose}/{update}/{sample}".encode()
    number = int.from_bytes(blake2b(key, digest_size=8).digest(), "little") >> 1  # 63 bits: non-negative
    return torch.Generator().manual_seed(number)
