"""Textured backgrounds that the embedded model has never seen: scenes of its world, painted before another ground."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from PIL import Image

KNOWN = ("wood", "bricks", "water", "grass")  # textures of the embedded model's own world
UNKNOWN = ("tiles", "pebbles", "cloth", "marble", "leaves")


@lru_cache(maxsize=16)
def paint_texture(name: str, size: int) -> np.ndarray:
    """The texture `name` as (size, size, 3) float32 RGB in [0, 1], painted at twice the size and averaged down."""
    axis = (np.arange(2 * size, dtype=np.float32) + 0.5) / (2 * size)
    v, u = np.meshgrid(axis, axis, indexing="ij")
    painters = {"tiles": _tiles, "pebbles": _pebbles, "cloth": _cloth, "marble": _marble, "leaves": _leaves}
    return painters[name](u, v).reshape(size, 2, size, 2, 3).mean((1, 3)).clip(0, 1).astype(np.float32)


def _tiles(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    light = ((np.floor(5 * u) + np.floor(5 * v)) % 2)[..., None]
    return light * np.array((0.86, 0.84, 0.78)) + (1 - light) * np.array((0.42, 0.5, 0.56))


def _pebbles(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    rng = np.random.default_rng(7)
    places, tones = rng.uniform(size=(90, 2)), rng.uniform(0.45, 0.8, 90)
    distance = np.sqrt((u[..., None] - places[:, 0]) ** 2 + (v[..., None] - places[:, 1]) ** 2)
    nearest = np.sort(distance, -1)
    edge = np.clip((nearest[..., 1] - nearest[..., 0]) / 0.025, 0, 1)
    return (tones[distance.argmin(-1)] * (0.45 + 0.55 * edge))[..., None] * np.array((1.0, 0.96, 0.9))


def _cloth(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    weave = 0.07 * np.sin(32 * math.pi * u) * np.sign(np.sin(32 * math.pi * v))
    bands = 0.10 * (np.sin(8 * math.pi * (u + v)) > 0.3)
    return np.stack([0.62 + weave - bands, 0.60 + weave - bands, 0.42 + weave - 1.5 * bands], -1)


def _marble(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    clouds = sum(_clouds(len(u), count) * 6 / count for count in (6, 12, 24))
    veins = 0.5 + 0.5 * np.sin(2 * math.pi * (3 * u + 2 * v) + 2.2 * clouds)
    return (0.62 + 0.3 * veins**0.5)[..., None] * np.array((0.95, 1.0, 0.98))


def _leaves(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    clouds = _clouds(len(u), 14) + 0.6 * _clouds(len(u), 28)
    return np.stack([0.22 + 0.10 * clouds, 0.42 + 0.13 * clouds, 0.18 + 0.07 * clouds], -1)


def _clouds(side: int, count: int) -> np.ndarray:
    """Smooth noise (side, side) of unit variance with `count` features along a side; the same at every call."""
    grid = np.random.default_rng(count).normal(size=(count, count)).astype(np.float32)
    return np.asarray(Image.fromarray(grid).resize((side, side), Image.Resampling.BICUBIC))
