"""Pictures to test with, and pictures as files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def gradient(width: int = 48, height: int = 32) -> Image.Image:
    """Red rises to the right, green downwards; blue is the inverse of red."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 255 - x], -1).astype(np.uint8))


def saved(image: Image.Image, path: Path, **options: object) -> Path:
    """Write the image, with options of Pillow's; returns its file."""
    image.save(path, **options)  # type: ignore[arg-type]
    return path
