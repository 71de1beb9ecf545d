"""Scenes that are not square, for the bench of photo edits."""

from __future__ import annotations

import numpy as np
import pytest

from personalize.embedded.frames import band, parse_shape, render_band
from personalize.embedded.scenes import render
from tests.bench.contract import random_task
from tests.bench.shapes import in_band


def test_a_square_is_the_scene_itself():
    task = random_task("object", 0, objects=1)
    assert parse_shape("160x120") == (160, 120) and in_band(task, (64, 64)) == task
    assert np.array_equal(render_band(task.before, (64, 64))[0], render(task.before, 64)[0])


@pytest.mark.parametrize("shape", [(64, 48), (48, 64)])
def test_all_that_lies_in_a_scene_lies_in_its_band(shape):
    """Up to the rounding of a sprite's size, 1 px of about 30."""
    task = random_task("object", 3, objects=2)
    fitted = in_band(task, shape)
    assert render_band(fitted.before, shape)[0].shape == (shape[1], shape[0], 3)
    for whole, ours in zip(render(task.before, 48)[1], render(fitted.before, 64)[1], strict=True):
        assert band(ours, shape).sum() == ours.sum() == pytest.approx(whole.sum(), rel=0.1)
