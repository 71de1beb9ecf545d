"""Random number generators that are seeded by their purpose and never use global state."""

from __future__ import annotations

from hashlib import blake2b

import torch


def generator(seed: int, purpose: str, update: int = 0, sample: int = 0) -> torch.Generator:
    """A new CPU generator that depends on `seed`, `purpose`, `update` and the global `sample` index alone.

    The same four values give the same numbers on every machine, whatever was drawn before.  Therefore a training run
    that is resumed, accumulates gradients, or uses several processes draws the same numbers as one unbroken run.
    """
    key = f"{seed}/{purpose}/{update}/{sample}".encode()
    number = int.from_bytes(blake2b(key, digest_size=8).digest(), "little") >> 1  # 63 bits: non-negative
    return torch.Generator().manual_seed(number)
