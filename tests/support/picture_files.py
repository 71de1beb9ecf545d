"""Pictures as files."""

from __future__ import annotations

from pathlib import Path

from PIL import Image


def saved(image: Image.Image, path: Path, **options: object) -> Path:
    """Write the image, with options of Pillow's; returns its file."""
    image.save(path, **options)  # type: ignore[arg-type]
    return path
