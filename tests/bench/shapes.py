"""Scenes that are not square: the same objects in a band of a square scene, on the same background.

A scene of W × H px is the middle band of a square of the longer side. Objects keep their size and place in fractions of
the shorter side, so that all lie in the band. The judge knows square pictures alone: an edited band is put back into
the true square before it looks.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from personalize.embedded.scenes import Scene, render
from tests.bench.contract import Score, Task, identity, region, score
from tests.bench.judge.judge import Judge

Shape = tuple[int, int]  # width and height in pixels


def parse_shape(text: str) -> Shape:
    """ "160x120" → (160, 120)."""
    width, height = (int(part) for part in text.split("x"))
    return width, height


def in_band(task: Task, shape: Shape) -> Task:
    """`task` with its objects moved and scaled into the band of `shape`; the same task for a square."""
    return replace(task, before=_scene_in_band(task.before, shape), after=_scene_in_band(task.after, shape))


def _scene_in_band(scene: Scene, shape: Shape) -> Scene:
    width, height = (side / max(shape) for side in shape)
    least = min(width, height)
    for index, thing in enumerate(scene.objects):
        x, y = 0.5 + (thing.x - 0.5) * width, 0.5 + (thing.y - 0.5) * height
        scene = scene.with_object(index, x=x, y=y, size=thing.size * least)
    return scene


def band(picture: np.ndarray, shape: Shape) -> np.ndarray:
    """The middle `shape` of a square picture or mask (S, S, …), S the longer side."""
    top, left = (len(picture) - shape[1]) // 2, (len(picture) - shape[0]) // 2
    return picture[top : top + shape[1], left : left + shape[0]]


def render_band(scene: Scene, shape: Shape) -> np.ndarray:
    """The scene (already in its band) as RGB uint8 (H, W, 3)."""
    return np.ascontiguousarray(band(render(scene, max(shape))[0], shape))


def score_band(task: Task, picture: np.ndarray, judge: Judge) -> Score:
    """`contract.score` of an edited band (H, W, 3): identity inside the band, success by the judge of the square."""
    shape = (picture.shape[1], picture.shape[0])
    truth = render(task.after, max(shape))[0]
    whole = truth.copy()
    band(whole, shape)[:] = picture
    inside = identity(picture, band(truth, shape), band(region(task, max(shape)), shape))
    return replace(score(task, whole, judge), **inside)
