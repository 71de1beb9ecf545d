"""Editing tasks on scenes that are not square, as windows of square ones (`embedded.frames`).

The judge knows square pictures alone: an edited window is put back into the true square before it looks.
"""

from __future__ import annotations

from dataclasses import replace
from zlib import crc32

import numpy as np

from personalize.embedded.frames import Shape, Window, random_window, scene_in_window
from personalize.embedded.scenes import render
from tests.bench.contract import Score, Task, region, score
from tests.bench.judge.judge import Judge
from tests.bench.picture_measures import identity


def window_of(task: Task, shape: Shape) -> Window:
    """A window of `shape` at a place that belongs to `task`, equally enlarged and about the same for every shape."""
    return random_window(shape, np.random.default_rng(crc32(task.name.encode())))


def in_window(task: Task, window: Window) -> Task:
    """`task` with its objects moved and scaled into the window; the same task for a whole square."""
    return replace(task, before=scene_in_window(task.before, window), after=scene_in_window(task.after, window))


def score_window(task: Task, picture: np.ndarray, window: Window, judge: Judge) -> Score:
    """`contract.score` of an edited window (H, W, 3): identity inside the window, success by the judge of the square.

    `task` is in the window already.
    """
    truth = render(task.after, window.side)[0]
    whole = truth.copy()
    window.of(whole)[:] = picture
    inside = identity(picture, window.of(truth), window.of(region(task, window.side)))
    return replace(score(task, whole, judge), **inside)
