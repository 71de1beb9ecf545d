"""Editing tasks on scenes that are not square, as bands of square ones (`embedded.frames`).

The judge knows square pictures alone: an edited band is put back into the true square before it looks.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from personalize.embedded.frames import Shape, middle_band, scene_in_window
from personalize.embedded.scenes import render
from tests.bench.contract import Score, Task, region, score
from tests.bench.judge.judge import Judge
from tests.bench.picture_measures import identity


def in_band(task: Task, shape: Shape) -> Task:
    """`task` with its objects moved and scaled into the band of `shape`; the same task for a square."""
    window = middle_band(shape)
    return replace(task, before=scene_in_window(task.before, window), after=scene_in_window(task.after, window))


def score_band(task: Task, picture: np.ndarray, judge: Judge) -> Score:
    """`contract.score` of an edited band (H, W, 3): identity inside the band, success by the judge of the square."""
    window = middle_band((picture.shape[1], picture.shape[0]))
    truth = render(task.after, window.side)[0]
    whole = truth.copy()
    window.of(whole)[:] = picture
    inside = identity(picture, window.of(truth), window.of(region(task, window.side)))
    return replace(score(task, whole, judge), **inside)
