"""The evaluation contract: truths, regions, success, identity, intervals, resumable cells."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from personalize.embedded.scenes import ANY_STYLE, STYLES, Scene, SceneObject, render
from tests.bench import contract, report
from tests.bench.cells import Cells
from tests.bench.contract import BASE, DO_NOTHING, KINDS, Task, evaluate, random_task, region, score
from tests.bench.intervals import paired_interval, wilson
from tests.bench.judge.judge import Judge
from tests.bench.picture_measures import PSNR_CAP, colour_distance, iou, lab, psnr, structure_distance

SIZE = 128


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge.load()


@pytest.mark.parametrize("kind", KINDS)
def test_the_truth_succeeds_and_doing_nothing_does_not(kind, judge):
    tasks = [random_task(kind, seed) for seed in range(12)]
    truths = [score(task, render(task.after, SIZE)[0], judge) for task in tasks]
    idle = [score(task, render(task.before, SIZE)[0], judge) for task in tasks]
    assert sum(one.success for one in truths) >= 11  # the judge is right in 99 % of scenes
    assert all((one.psnr, one.colour, one.structure) == (PSNR_CAP, 0, 0) for one in truths)
    assert sum(one.success for one in idle) == 0


def test_region_of_each_edit():
    cat, dog = SceneObject("cat", "3d", 0.3, 0.5, 0.4), SceneObject("dog", "3d", 0.7, 0.5, 0.4)
    scene = Scene("grass", (cat, dog))
    masks = render(scene, SIZE)[1]

    def found(kind: str, after: Scene) -> np.ndarray:
        return region(Task(kind, "", scene, after, 0), SIZE)

    np.testing.assert_array_equal(found("background", scene.with_background("red")), masks[0] | masks[1])
    swapped = scene.with_object(0, noun="fox")
    np.testing.assert_array_equal(found("object", swapped), ~(masks[0] | render(swapped, SIZE)[1][0]))
    drawn = scene.with_style("drawing")
    np.testing.assert_array_equal(found("style", drawn), ~np.any([*masks, *render(drawn, SIZE)[1]], axis=0))
    assert found("move", scene.with_object_shifted(0, 0.1, 0.1)).all()


def test_likeness_is_of_the_objects_that_stay_and_falls_when_one_is_another():
    cat, dog = SceneObject("cat", "3d", 0.3, 0.5, 0.4), SceneObject("dog", "3d", 0.7, 0.5, 0.4)
    scene = Scene("grass", (cat, dog))

    def of(kind: str, after: Scene, shown: Scene) -> float:
        found = contract.likeness(Task(kind, "", scene, after, 0), render(shown, SIZE)[0])
        return -2 if found is None else found

    snow, pig = scene.with_background("snow"), scene.with_object(0, noun="pig")
    assert of("background", snow, snow) > report.ALIKE > of("background", snow, pig.with_background("snow"))
    assert of("object", pig, pig) > report.ALIKE > of("object", pig, pig.with_object(1, noun="frog")), "the dog stays"
    assert of("style", scene.with_style("drawing"), scene) == -2
    moved = scene.with_object_shifted(0, 0.1, 0.2)
    assert of("move", moved, moved) > report.ALIKE


def test_random_tasks_change_one_thing_and_are_reproducible():
    for kind in KINDS:
        for seed in range(20):
            task = random_task(kind, seed)
            assert task == random_task(kind, seed) and task.before != task.after
            assert task.source_prompt != task.target_prompt or kind == "move"
    moved = random_task("move", 3)
    one, other = moved.before.objects[0], moved.after.objects[0]
    assert 0.15 <= math.dist((one.x, one.y), (other.x, other.y)) <= 0.5


def test_prompts_name_the_style_only_when_the_style_is_edited():
    background, style = random_task("background", 0), random_task("style", 0)
    assert background.target_prompt.startswith(f"{ANY_STYLE} ") and style.source_prompt.startswith(f"{ANY_STYLE} ")
    assert style.target_prompt.startswith(f"{STYLES[style.after.objects[0].style]} ")


def test_unknown_kinds_and_empty_choices_are_refused():
    with pytest.raises(ValueError, match="background, object"):
        random_task("colour", 0)
    with pytest.raises(ValueError, match="nothing to change to"):
        random_task("style", 0, styles=("3d",), new_styles=("3d",))


def test_psnr_of_a_known_error():
    black, grey = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 51, np.uint8)
    assert psnr(grey, black) == pytest.approx(-20 * math.log10(0.2))
    half = np.zeros((4, 4), bool)
    half[:2] = True
    mixed = np.where(half[..., None], black, grey).astype(np.uint8)
    assert psnr(mixed, black, half) == PSNR_CAP
    assert psnr(mixed, black) == pytest.approx(-10 * math.log10(0.02))


def test_dpl_c08_iou():
    half = np.zeros((4, 4), bool)
    half[:2] = True
    assert iou(half, half) == 1 and iou(half, ~half) == 0 and iou(half, half | ~half) == 0.5
    assert iou(half & ~half, half & ~half) == 1


def test_lab_of_known_colours():
    rgb = np.array([[255, 255, 255], [255, 0, 0], [0, 0, 0]], np.uint8)
    known = [[100, 0, 0], [53.24, 80.09, 67.20], [0, 0, 0]]  # published values for sRGB under D65
    np.testing.assert_allclose(lab(rgb), known, atol=0.05)  # the matrix has five digits


def test_colour_distance_ignores_places_and_measures_shifts():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 200, (16, 16, 3)).astype(np.uint8)
    shuffled = rng.permutation(image.reshape(-1, 3)).reshape(image.shape)
    everywhere = np.ones((16, 16), bool)
    assert colour_distance(shuffled, image, everywhere) == 0
    assert colour_distance(image + 30, image, everywhere) > 2
    assert structure_distance(shuffled, image, everywhere) > 0.4


def test_structure_distance_ignores_brightness_and_notices_missing_objects():
    scene = Scene("blue", (SceneObject("cat", "3d"),))
    image, masks = render(scene, 64)
    empty = render(Scene("blue", ()), 64)[0]
    assert structure_distance(image, image, masks[0]) == 0
    assert structure_distance((image * 0.95).astype(np.uint8), image, masks[0]) < 0.15
    assert structure_distance(empty, image, masks[0]) > 0.7


def test_wilson_interval_of_a_textbook_case():
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 0) == (0, 1) and wilson(10, 10)[1] == pytest.approx(1)


def test_paired_interval_is_of_the_differences():
    noise = np.random.default_rng(2).normal(0, 50, 30)
    assert paired_interval((noise + 1).tolist(), noise.tolist()) == pytest.approx((1, 1, 1))


def test_cells_survive_interruption_and_refuse_other_settings(tmp_path):
    path = tmp_path / "cells.jsonl"
    Cells(path, {"steps": 30}).add("a/1", {"value": 2})
    with path.open("a") as file:
        file.write('{"key": "a/2", "val')  # the process died here
    again = Cells(path, {"steps": 30})
    assert again.once("a/1", lambda: pytest.fail("ran again")) == {"key": "a/1", "value": 2}
    again.once("a/2", lambda: {"value": 3})
    assert [json.loads(line) for line in path.read_text().splitlines()][2] == {"key": "a/2", "value": 3}
    with pytest.raises(ValueError, match="give another file"):
        Cells(path, {"steps": 50})


def test_a_bench_resumes_and_reports(tmp_path, judge):
    tasks = [random_task(kind, seed) for kind in ("background", "object") for seed in range(3)]
    calls = []

    def truth(task, before, budget):
        calls.append(task.name)
        return [render(task.after, SIZE)[0]] * budget

    arms = {DO_NOTHING: contract.do_nothing, BASE: contract.do_nothing, "truth": truth}
    evaluate(tasks[:4], arms, Cells(tmp_path / "cells.jsonl", {"adapter": "none"}), judge, budget=2, size=SIZE)
    cells = Cells(tmp_path / "cells.jsonl", {"adapter": "none"})
    rows = evaluate(tasks, arms, cells, judge, budget=2, size=SIZE)
    assert len(rows) == 18 and calls == [task.name for task in tasks]
    table = report.table(rows)
    assert "| background | truth | 3 | 100.0 [43.9, 100.0] |" in table and "+100.0 [+100.0, +100.0]" in table
    sheet = report.contact_sheet(tasks, list(arms), cells)
    assert sheet.width > 5 * 128 and sheet.height > 6 * 128


def test_a_bench_without_its_controls_is_refused(tmp_path, judge):
    with pytest.raises(ValueError, match="base without adapter"):
        evaluate([], {DO_NOTHING: contract.do_nothing}, Cells(tmp_path / "cells.jsonl", {}), judge)
