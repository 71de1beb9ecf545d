"""Pictures to drag, and an adapter with random weights."""

from __future__ import annotations

import numpy as np
from PIL import Image


def picture(width=64, height=64, seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def square(width=64, height=64, box=(12, 16, 36, 40)):
    """A mask picture: white in `box` (left, top, right, bottom)."""
    mask = Image.new("L", (width, height))
    mask.paste(255, box)
    return mask
