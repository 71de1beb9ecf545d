"""Scenes that are not square, for the bench of photo edits."""

from __future__ import annotations

import numpy as np
import pytest

from personalize.embedded.frames import middle_band, parse_shape, random_window, render_window, scene_in_window
from personalize.embedded.scenes import render
from tests.bench.contract import random_task
from tests.bench.shapes import in_window, window_of


def test_a_square_is_the_scene_itself():
    task = random_task("object", 0, objects=1)
    assert parse_shape("160x120") == (160, 120) and in_window(task, middle_band((64, 64))) == task
    assert np.array_equal(render_window(task.before, middle_band((64, 64)))[0], render(task.before, 64)[0])


@pytest.mark.parametrize("shape", [(64, 48), (48, 64)])
def test_all_that_lies_in_a_scene_lies_in_its_band(shape):
    """Up to the rounding of a sprite's size, 1 px of about 30."""
    task = random_task("object", 3, objects=2)
    band = middle_band(shape)
    fitted = in_window(task, band)
    assert render_window(fitted.before, band)[0].shape == (shape[1], shape[0], 3)
    for whole, ours in zip(render(task.before, 48)[1], render(fitted.before, 64)[1], strict=True):
        assert band.of(ours).sum() == ours.sum() == pytest.approx(whole.sum(), rel=0.1)


@pytest.mark.parametrize("shape", [(64, 64), (64, 48), (48, 64)])
def test_all_that_lies_in_a_scene_lies_in_any_window_of_a_larger_one(shape):
    """So that a model learns horizons and bricks at other places than the squares have them."""
    scene, rng = random_task("object", 3, objects=2).before, np.random.default_rng(0)
    windows = [random_window(shape, rng) for _ in range(8)]
    assert len({(window.side, window.left, window.top) for window in windows}) == 8
    for window in windows:
        picture, masks = render_window(scene_in_window(scene, window), window)
        assert picture.shape == (shape[1], shape[0], 3)
        for whole, ours in zip(render(scene, 48 if 48 in shape else 64)[1], masks, strict=True):
            assert ours.sum() == pytest.approx(whole.sum(), rel=0.1)  # a sprite's size is rounded to pixels


def test_a_task_has_its_own_window_enlarged_alike_in_every_shape():
    """So that photos of two shapes differ by their shape alone."""
    tasks = [random_task("object", seed, objects=1) for seed in range(6)]
    square, wide = ([window_of(task, shape).side for task in tasks] for shape in ((128, 128), (128, 96)))
    assert square == wide and len(set(square)) > 3 and all(128 <= side <= 192 for side in square)
    assert window_of(tasks[0], (128, 96)) == window_of(tasks[0], (128, 96))
