"""Scenes in frames that are not square: the middle band of a square scene of the longer side.

Objects keep their size and place in fractions of the shorter side, so that all lie in the band.
"""

from __future__ import annotations

import numpy as np

from personalize.embedded.scenes import Scene, render

Shape = tuple[int, int]  # width and height in pixels


def parse_shape(text: str) -> Shape:
    """ "160x120" → (160, 120).

    Raises:
        ValueError: the text is no such size.
    """
    width, height = (int(part) for part in text.split("x"))
    return width, height


def scene_in_band(scene: Scene, shape: Shape) -> Scene:
    """`scene` with its objects moved and scaled into the band of `shape`; the same scene for a square."""
    width, height = (side / max(shape) for side in shape)
    for index, thing in enumerate(scene.objects):
        x, y = 0.5 + (thing.x - 0.5) * width, 0.5 + (thing.y - 0.5) * height
        scene = scene.with_object(index, x=x, y=y, size=thing.size * min(width, height))
    return scene


def band(picture: np.ndarray, shape: Shape) -> np.ndarray:
    """The middle `shape` of a square picture or mask (S, S, …), S the longer side; a view of it."""
    top, left = (len(picture) - shape[1]) // 2, (len(picture) - shape[0]) // 2
    return picture[top : top + shape[1], left : left + shape[0]]


def render_band(scene: Scene, shape: Shape) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """`scene` (already in its band) as RGB uint8 (H, W, 3), and the mask (H, W) of each object."""
    image, masks = render(scene, max(shape))
    return np.ascontiguousarray(band(image, shape)), tuple(np.ascontiguousarray(band(mask, shape)) for mask in masks)
