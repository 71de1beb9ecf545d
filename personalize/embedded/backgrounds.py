"""Backgrounds of scenes: plain colours, and places that are each painted by a formula."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np

COLOURS = {  # RGB in [0, 1]
    "red": (0.84, 0.22, 0.20),
    "orange": (0.95, 0.57, 0.22),
    "yellow": (0.96, 0.86, 0.36),
    "green": (0.30, 0.66, 0.34),
    "teal": (0.20, 0.65, 0.66),
    "blue": (0.24, 0.42, 0.82),
    "purple": (0.52, 0.32, 0.72),
    "pink": (0.96, 0.66, 0.77),
    "brown": (0.50, 0.34, 0.22),
    "gray": (0.58, 0.58, 0.60),
    "black": (0.13, 0.13, 0.15),
    "white": (0.96, 0.96, 0.96),
}


@lru_cache(maxsize=128)
def paint_background(name: str, size: int) -> np.ndarray:
    """The background `name` as (size, size, 3) float32 RGB in [0, 1], painted at twice the size and averaged down."""
    axis = (np.arange(2 * size, dtype=np.float32) + 0.5) / (2 * size)
    v, u = np.meshgrid(axis, axis, indexing="ij")
    paint = _PAINTERS.get(name) or (lambda u, v: _flat_colour(COLOURS[name], v))
    enlarged = paint(u, v).reshape(size, 2, size, 2, 3)
    return enlarged.mean((1, 3)).clip(0, 1).astype(np.float32)


def _flat_colour(rgb: Sequence[float], v: np.ndarray) -> np.ndarray:
    """One colour, a little lighter at the top than at the bottom."""
    return np.asarray(rgb, np.float32) * (1.06 - 0.12 * v[..., None])


def _bands(v: np.ndarray, *bands: tuple[object, Sequence[float]]) -> np.ndarray:
    """Horizontal bands from the top down, each given as (the v where it starts, its colour).

    A start may be an array like `v`, for a border that is not straight.
    """
    out = np.broadcast_to(np.asarray(bands[0][1], np.float32), (*v.shape, 3)).copy()
    for start, rgb in bands[1:]:
        out[v >= start] = rgb
    return out


def _beach(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return _bands(v, (0, (0.62, 0.82, 0.96)), (0.36, (0.16, 0.48, 0.76)), (0.52, (0.93, 0.85, 0.66)))


def _grass(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    blades = 0.05 * np.sin(2 * math.pi * (7 * u + 2 * v)) * np.sin(2 * math.pi * 6 * v)
    ground = np.stack([0.34 + blades, 0.62 + blades, 0.24 + blades], -1)
    sky = np.asarray((0.66, 0.85, 0.98), np.float32)
    return np.where((v >= 0.36)[..., None], ground, sky)


def _night(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    sky = np.stack([0.06 + 0.10 * v, 0.07 + 0.12 * v, 0.24 + 0.14 * v], -1)
    spots = np.random.default_rng(5).uniform(size=(28, 2))
    for x, y in spots:
        sky += 0.8 * np.exp(-((u - x) ** 2 + (v - y) ** 2) / (2 * 0.008**2))[..., None]
    return sky


def _snow(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    hill = 0.42 + 0.03 * np.sin(2 * math.pi * u)
    return _bands(v, (0, (0.60, 0.74, 0.88)), (hill, (0.94, 0.96, 0.99)))


def _desert(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    dune, front = 0.42 + 0.06 * np.sin(2 * math.pi * u), 0.70 + 0.05 * np.sin(2 * math.pi * u + 2)
    return _bands(v, (0, (0.99, 0.86, 0.62)), (dune, (0.88, 0.62, 0.36)), (front, (0.80, 0.53, 0.29)))


def _wood(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    grain = 0.06 * np.sin(2 * math.pi * (6 * v + 0.25 * np.sin(2 * math.pi * u)))
    plank = 0.06 * (np.floor(4 * v) % 2)
    tone = grain + plank
    return np.stack([0.66 + tone, 0.45 + tone, 0.26 + 0.7 * tone], -1)


def _water(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    waves = np.sin(2 * math.pi * (4 * v + 0.35 * np.sin(2 * math.pi * 2 * u)))
    return np.stack([0.18 + 0.06 * waves, 0.55 + 0.07 * waves, 0.80 + 0.06 * waves], -1)


def _bricks(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    row = np.floor(6 * v)
    x, y = 3 * u + 0.5 * (row % 2), 6 * v
    mortar = (np.abs(x - np.round(x)) < 0.04) | (np.abs(y - np.round(y)) < 0.08)
    tone = 0.04 * np.sin(2.4 * np.floor(x) + 4.1 * row)
    brick = np.stack([0.70 + tone, 0.36 + tone, 0.28 + tone], -1)
    return np.where(mortar[..., None], np.asarray((0.80, 0.68, 0.62), np.float32), brick)


_PAINTERS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "beach": _beach,
    "grass": _grass,
    "night": _night,
    "snow": _snow,
    "desert": _desert,
    "wood": _wood,
    "water": _water,
    "bricks": _bricks,
}
