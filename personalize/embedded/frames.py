"""Scenes in frames that are not square: a window of a square scene, such as the middle band of one of the longer side.

Objects keep their size and place in fractions of the window, its shorter side for the size, so that all lie in it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from personalize.embedded.scenes import Scene, render

Shape = tuple[int, int]  # width and height in pixels


@dataclass(frozen=True)
class Window:
    """Where a frame of `shape` lies in a square scene of `side` px: its left and upper edge, in pixels."""

    shape: Shape
    side: int
    left: int
    top: int

    def of(self, picture: np.ndarray) -> np.ndarray:
        """The window of a square picture or mask (side, side, …); a view of it."""
        width, height = self.shape
        return picture[self.top : self.top + height, self.left : self.left + width]


def parse_shape(text: str) -> Shape:
    """ "160x120" → (160, 120).

    Raises:
        ValueError: the text is no such size.
    """
    width, height = (int(part) for part in text.split("x"))
    return width, height


def middle_band(shape: Shape) -> Window:
    """The middle of a square of the longer side."""
    side = max(shape)
    return Window(shape, side, (side - shape[0]) // 2, (side - shape[1]) // 2)


def random_window(shape: Shape, rng: np.random.Generator, largest: float = 1.5) -> Window:
    """A window anywhere in a square whose side is 1 to `largest` times the longer side."""
    side = round(max(shape) * rng.uniform(1, largest))
    left, top = (int(rng.integers(side - length + 1)) for length in shape)
    return Window(shape, side, left, top)


def scene_in_window(scene: Scene, window: Window) -> Scene:
    """`scene` with its objects moved and scaled into the window; the same scene for a whole square."""
    (width, height), side = window.shape, window.side
    if width == height == side:
        return scene
    for index, thing in enumerate(scene.objects):
        x, y = (window.left + thing.x * width) / side, (window.top + thing.y * height) / side
        scene = scene.with_object(index, x=x, y=y, size=thing.size * min(width, height) / side)
    return scene


def render_window(scene: Scene, window: Window) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """`scene` (already in its window) as RGB uint8 (H, W, 3), and the mask (H, W) of each object."""
    image, masks = render(scene, window.side)
    return np.ascontiguousarray(window.of(image)), tuple(np.ascontiguousarray(window.of(mask)) for mask in masks)
