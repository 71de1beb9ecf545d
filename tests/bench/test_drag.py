"""The bench of drags in miniature, and its measures on pictures whose answer is known."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from personalize.editing.drag.pixels import least_squares_map, mapped
from personalize.embedded.scenes import Scene, SceneObject, random_scene, render
from tests.bench.contract import BASE, DO_NOTHING
from tests.bench.drag import bench as bench
from tests.bench.drag.bench import DragBench
from tests.bench.drag.figures import PASTE, figures
from tests.bench.drag.mean_distance import dift_features, distance_left
from tests.bench.drag.measures import (
    away_from,
    background_only,
    centroid_shift,
    disc,
    drag_task,
    find_shift,
    ghost,
    handle_point,
    paste_object,
    seam,
)
from tests.bench.drag.textures import UNKNOWN, paint_texture
from tests.bench.drag.turns import TURNS, found_turn
from tests.support.tiny import tiny_sd1

SIZE = 96
BEFORE = Scene("teal", (SceneObject("cat", "3d", 0.35, 0.5, 0.36),))
AFTER = BEFORE.with_object_shifted(0, 0.25, -0.125)  # 24 px right, 12 px up


@pytest.fixture(scope="module")
def scene():
    (before, (mask,)), (truth, (end,)) = render(BEFORE, SIZE), render(AFTER, SIZE)
    return before, mask, truth, end, background_only(BEFORE, SIZE)


def test_the_truth_is_where_it_is_and_doing_nothing_goes_nowhere(scene):
    before, mask, truth, _, background = scene
    assert find_shift(truth, before, mask) == (24, -12) and find_shift(before, before, mask) == (0, 0)
    shift = centroid_shift(truth, before, background)
    assert shift == pytest.approx((24, -12), abs=1.0)  # the shadow and the sky's slope count a little
    handle = handle_point(mask)
    assert mask[int(handle[1]), int(handle[0])]
    assert find_shift(truth, before, disc(mask.shape, handle, 8) & mask) == (24, -12)


def test_ghost_seam_and_background(scene):
    before, mask, truth, end, background = scene
    left = mask & away_from([end], 1, 1)
    copy = paste_object(before, mask, (24, -12))
    assert ghost(truth, before, background, left, mask) < 0.05
    assert ghost(before, before, background, left, mask) == ghost(copy, before, background, left, mask) > 0.4
    assert seam(truth, truth, end, 4) == 60 > seam(copy, truth, end, 4) > seam(before, truth, end, 4)
    far = away_from([mask, end], 4)
    assert far.any() and not (far & (mask | end)).any()


@pytest.mark.parametrize("name", UNKNOWN)
def test_textures_are_the_same_every_time_and_objects_stand_before_them(name):
    texture = paint_texture(name, SIZE)
    assert texture.shape == (SIZE, SIZE, 3) and 0 <= texture.min() < texture.max() <= 1 and texture.std() > 0.02
    picture, (mask,) = render(BEFORE, SIZE, texture)
    ground = background_only(BEFORE, SIZE, texture)
    assert np.array_equal(ground, (texture * 255 + 0.5).astype(np.uint8))
    assert np.array_equal(render(BEFORE, SIZE)[1][0], mask)
    assert (picture != ground)[mask].any(-1).mean() > 0.9, "a few pixels may have the ground's colour"


@pytest.mark.parametrize("twin", [False, True])
def test_tasks_stay_in_the_frame_and_go_as_far_as_asked(twin):
    for seed in range(8):
        task = drag_task(random_scene(seed, split="test", objects=1), seed, 0.25, twin=twin)
        first, last = task.before.objects[0], task.after.objects[0]
        assert math.dist((first.x, first.y), (last.x, last.y)) == pytest.approx(0.25)
        for thing in (first, last):
            assert thing.size / 2 <= thing.x <= (0.5 if twin else 1) - thing.size / 2 + 1e-9
        assert len(task.before.objects) == 1 + twin and task.before.objects[1:] == task.after.objects[1:]


@pytest.mark.parametrize("turn", TURNS, ids=lambda turn: turn.name)
def test_turns_are_found_in_the_truth_and_their_points_say_where_things_go(turn):
    first, last = turn.scenes(BEFORE)
    (before, (mask,)), (truth, (end,)) = render(first, SIZE), render(last, SIZE)
    assert found_turn(truth, first, None) == (turn.angle, turn.scale) and found_turn(before, first, None) == (0, 1)
    points = turn.points(mask, end)
    matrix = least_squares_map(points[::2], points[1::2], "similarity")
    places = np.argwhere(mask)[::7, ::-1]
    inside = [end[round(y), round(x)] for x, y in (mapped(matrix, tuple(map(float, place))) for place in places)]
    assert np.mean(inside) > 0.97, "only pixels of the border may fall outside, by rounding"


def test_md_is_the_distance_between_where_a_handle_is_found_and_its_target():
    """DragBench's MD, on features that are known, and on those of equal pictures: 0 px where it is, 5 px from 3, 4."""
    source = torch.randn(8, 12, 10, generator=torch.Generator().manual_seed(0))
    assert distance_left(source, source.roll((2, 3), (1, 2)), (4.0, 5.0), (7.0, 7.0)) == 0
    assert distance_left(source, source, (4.0, 5.0), (7.0, 9.0)) == 5
    model, picture = tiny_sd1(), render(BEFORE, 64)[0]
    features = dift_features(model, picture, "a cat")
    assert features.shape[1:] == (64, 64) and torch.equal(features, dift_features(model, picture, "a cat"))
    assert not model.unet.up_blocks[1]._forward_hooks
    assert distance_left(features, features, (30.0, 30.0), (33.0, 34.0)) == pytest.approx(5, abs=4)  # cells of 8 px


@pytest.mark.slow  # a bench in miniature
def test_it_measures_resumes_and_writes(tmp_path, monkeypatch):
    model = tiny_sd1()
    arms = ("move", "deform")
    options = DragBench(scenes=2, arms=arms, steps=2, strength=1.0, true_mask=True, output_dir=tmp_path, model=tmp_path)
    monkeypatch.setattr(bench, "DISTANCES", (4,))
    monkeypatch.setattr("tests.bench.drag.figures.DISTANCES", (4,))
    monkeypatch.setattr(bench, "TURNS", TURNS[:1])
    monkeypatch.setattr("tests.bench.drag.turns.TURNS", TURNS[:1])
    monkeypatch.setattr("tests.bench.drag.calibration.THRESHOLDS", (0.3,))
    monkeypatch.setattr("tests.bench.drag.calibration.BANDS", ((0, 500),))
    found = bench.run(options, model)
    assert {name.split()[0] for name in found} >= {"D9", "D10", "D11", "D12", "D17"}
    assert any(name.startswith("D9 AUC") and name.endswith("τ 0.3") for name in found)
    text = (tmp_path / "figures.md").read_text()
    assert all(arm in text for arm in ("up_blocks.3", *arms, DO_NOTHING, BASE, PASTE, *found))
    assert found["MD truth, 4 cells"]["n"] == found["MD move, 4 cells"]["n"] == 2
    assert found["turn by 30°: nothing_db"]["value"] > 5
    monkeypatch.setattr(bench.Bench, "row", None)
    assert bench.run(options, model) == json.loads((tmp_path / "figures.json").read_text())


def test_figures_of_a_perfect_drag():
    """Doing everything right gives 100 %, nothing left of the way; the seam and time are as said."""
    row = {"cells": 4, "twin": False, "vector": (16.0, 0.0), "went": (16.0, 0.0), "marker": (16.0, 0.0),
           "centroid": (8.0, 0.0), "background_db": 30.0, "ghost": 0.0, "seam_db": 30.0, "mean_ratio": 0.5,
           "warped": (8.5, 1.0), "seconds": 10.0, "edit_seconds": 0.5, "twin_went": (0.0, 1.0)}  # fmt: skip
    arms = [("move", False), ("deform", False), ("move", True), (BASE, False), (PASTE, False)]
    rows = [row | {"arm": arm, "twin": twin, "seed": seed} for arm, twin in arms for seed in range(3)]
    found = figures(rows, 4)
    for name in ("D10 moved by 4 cells within tolerance", "D11 centroid as the mean ratio says, 4 cells",
                 "D11 centroid as the warp says, 4 cells",
                 "D13 ghost of at most 15 %", "D14 twin stays within a cell"):  # fmt: skip
        assert found[name]["value"] == 100 and found[name]["n"] == 3
    assert found["D15 distance left, share of the way"]["value"] == 0
    assert found["D17 latent edit, share of the time"]["value"] == pytest.approx(0.05)
    away = [entry | {"went": (0.0, 16.0)} for entry in rows]
    assert figures(away, 4)["D10 moved by 4 cells within tolerance"]["value"] == 0
    apart = [entry | {"warped": (4.0, 0.0)} for entry in rows]
    assert figures(apart, 4)["D11 centroid as the warp says, 4 cells"]["value"] == 0
    assert np.isfinite(found["D12 background below the replay's"]["value"])
