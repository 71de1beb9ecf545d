"""`personalize evaluate` on small folders laid out like the published benchmarks."""

from __future__ import annotations

import json
import math
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from personalize.cli.main import main
from personalize.embedded.scenes import random_scene, render
from personalize.errors import UserError
from personalize.evaluation.benchmarks import (
    BenchmarkItem,
    decode_mask,
    find_result,
    read_benchmark,
    read_edit_list,
    size_warning,
)
from personalize.evaluation.metrics import ImagePair, drag_metrics
from personalize.evaluation.networks import Unavailable
from personalize.evaluation.point_matching import PointMatching
from personalize.evaluation.report import mean_interval, summarize
from personalize.io.images import to_pixels
from personalize.models.stable_diffusion import StableDiffusion
from tests.support.benchmarks import evaluated, noise


@pytest.fixture
def pie(tmp_path):
    """Two items: a mask of the upper half, and one that covers everything."""
    folder = tmp_path / "pie"
    (folder / "annotation_images/0_random").mkdir(parents=True)
    entries = {}
    for number, runs in enumerate(([0, 512 * 256], [0, 512 * 512])):
        path = f"0_random/{number:012}.jpg"
        noise(number, (512, 512)).save(folder / "annotation_images" / path)
        entries[f"{number:012}"] = {
            "image_path": path, "original_prompt": "a [cat]", "editing_prompt": "a [dog] on grass", "mask": runs,
            "editing_type_id": "0",
        }  # fmt: skip
    (folder / "mapping_file.json").write_text(json.dumps(entries))
    return folder


def test_pie_bench(pie, tmp_path, capsys):
    """The first result keeps the lower half, so its background is equal but for the border; the other has none."""
    results = tmp_path / "results/0_random"
    results.mkdir(parents=True)
    photo = np.asarray(Image.open(pie / "annotation_images/0_random/000000000000.jpg")).copy()
    photo[:256] = 0
    strip = np.concatenate([np.zeros_like(photo), photo], 1)  # as PnPInversion saves them: the last panel counts
    Image.fromarray(strip).save(results / "000000000000.png")
    noise(9, (512, 512)).save(results / "000000000001.png")
    code, found = evaluated(pie, results.parent, tmp_path)
    assert code == 0 and found["measured"] == 2
    first, second = found["rows"]
    assert first["psnr"] is None and first["mse"] == 0 and first["psnr, whole frame"] < 20
    assert "leaves no background" in second["psnr"]
    assert found["summary"]["psnr"]["infinite"] == 1 and found["summary"]["mse"]["n"] == 1
    shown = capsys.readouterr().out
    assert "2 of 2 results" in shown and "--structure_model" in shown and "--clip_model" in shown
    assert all(name in shown for name in ("structure", "lpips", "clip whole", "clip edited"))  # never skipped silently


def test_pie_bench_prompts_have_no_brackets_and_masks_have_a_border(pie):
    name, items = read_benchmark(pie)
    assert name == "PIE-Bench" and items[0].target_prompt == "a dog on grass"
    mask = decode_mask([512 * 2 + 5, 3])
    assert mask[2, 5:8].all() and mask[0].all() and mask[:, -1].all() and not mask[2, 8:-1].any()


def test_results_that_are_not_there_are_an_error_that_says_where_they_belong(pie, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert evaluated(pie, tmp_path / "empty", tmp_path)[0] == 2
    assert "0_random/000000000000.png" in capsys.readouterr().err
    assert evaluated(pie, tmp_path / "nowhere", tmp_path)[0] == 2
    assert "nowhere does not exist: check the path" in capsys.readouterr().err


def test_a_damaged_result_costs_its_own_line_alone(pie, tmp_path, capsys):
    results = tmp_path / "results/0_random"
    results.mkdir(parents=True)
    for number in (0, 1):
        noise(9, (512, 512)).save(results / f"{number:012}.png")
    cut = results / "000000000000.png"
    cut.write_bytes(cut.read_bytes()[:5000])
    code, found = evaluated(pie, results.parent, tmp_path)
    assert code == 0 and found["measured"] == 1 and list(found["unreadable"]) == ["000000000000"]
    assert "000000000000: not measured: " in capsys.readouterr().out
    (results / "000000000001.png").write_bytes(cut.read_bytes())
    assert evaluated(pie, results.parent, tmp_path)[0] == 2
    assert "none of the 2 results of PIE-Bench can be read" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_said_before_anything_is_measured(pie, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("personalize.cli.commands.evaluate.read_benchmark", lambda *given, **more: pytest.fail("begun"))
    results = tmp_path / "results"
    results.mkdir()
    for output, says in ((results, "is a folder, the name of a file"), ("/proc/nope/x.json", "not write")):
        words = ["evaluate", str(pie), "--results", str(results), "--output", str(output)]
        assert main(words) == 2
        assert says in capsys.readouterr().err
    for command in ("inspect", "verify"):
        extra = ["--on_base", "fp8"] if command == "verify" else []
        assert main([command, str(pie), "--picture", str(results), *extra]) == 2
        assert "is a folder, the name of a file" in capsys.readouterr().err


def test_no_evaluation_replaces_another(pie, tmp_path, capsys, monkeypatch):
    results = tmp_path / "results/0_random"
    results.mkdir(parents=True)
    noise(9, (512, 512)).save(results / "000000000000.png")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    words = ["evaluate", str(pie), "--results", str(results.parent)]
    for name in ("evaluation.json", "evaluation-001.json", "named.json"):
        more = ["--output", name] if name == "named.json" else []
        assert main([*words, *more]) == 0 and f"every value in {name}" in capsys.readouterr().out
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "work").iterdir()}
    assert set(before) == {"evaluation.json", "evaluation-001.json", "named.json"}
    for command in (words, ["inspect", str(pie)], ["verify", str(pie), "--on_base", "fp8"]):
        assert main([*command, "--output" if command is words else "--picture", "named.json"]) == 2
        assert "named.json exists already: name another output" in capsys.readouterr().err
    assert before == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "work").iterdir()}


@pytest.mark.parametrize("mask", ["foo", [[[1]]], [[1, 0], [1]], [], [["a"]], {"a": 1}])
def test_a_mask_of_dragbench_that_is_no_table_is_one_line(mask, tmp_path):
    sample = tmp_path / "drag/one"
    sample.mkdir(parents=True)
    noise(5).save(sample / "original_image.png")
    (sample / "meta_data.json").write_text(json.dumps({"mask": mask, "points": []}))
    with pytest.raises(UserError, match="one: the mask is no table of numbers"):
        read_benchmark(tmp_path / "drag")


def test_tedbench(tmp_path):
    folder = tmp_path / "ted"
    (folder / "originals").mkdir(parents=True)
    for name in ("bird.jpg", "dog.jpg"):
        noise(3).save(folder / "originals" / name)
    listed = [["bird.jpg", "A bird spreading wings."], ["bird.jpg", "Two birds."], ["dog.jpg", "A sitting dog."]]
    (folder / "input_list.json").write_text(json.dumps(listed))
    name, items = read_benchmark(folder)
    assert name == "TEdBench" and [item.result for item in items] == ["bird_0", "bird_1", "dog"]
    (folder / "input_list.json").write_text(json.dumps([["dog.png", "A cat."], ["dog.jpg", "A fox."]]))
    assert [item.result for item in read_benchmark(folder)[1]] == ["dog_0", "dog_1"], "they had one result between them"
    (folder / "input_list.json").write_text(json.dumps(listed))
    (tmp_path / "results").mkdir()
    noise(4).save(tmp_path / "results/dog.png")
    code, found = evaluated(folder, tmp_path / "results", tmp_path)
    assert code == 0 and found["measured"] == 1 and found["rows"][0]["psnr"] == "not measured: no mask"
    path = folder / "input_list.json"
    path.write_text(json.dumps({"bird.jpg": ["a", "b"]}))
    assert read_edit_list(path) == [("bird.jpg", "a"), ("bird.jpg", "b")]
    path.write_text(json.dumps([["../secret.jpg", "x"]]))
    with pytest.raises(UserError, match="leads out of"):
        read_benchmark(folder)


def test_forgedit_c32_tedbench_is_a_hundred_edits_of_forty_pictures(tmp_path):
    listed = [[f"{number % 40}.jpg", f"edit {number}"] for number in range(100)]
    (tmp_path / "input_list.json").write_text(json.dumps(listed))
    assert size_warning(*read_benchmark(tmp_path)) == ""
    (tmp_path / "input_list.json").write_text(json.dumps(listed[:-1]))
    assert "100 edits of 40 pictures, this folder 99 of 40" in size_warning(*read_benchmark(tmp_path))


def test_dragbench_reads_arrays_of_pickles_if_allowed_and_nothing_else(tmp_path, capsys):
    sample = tmp_path / "drag/animals/one"
    sample.mkdir(parents=True)
    noise(5).save(sample / "original_image.png")
    mask = np.zeros((64, 64), np.uint8)
    mask[:20] = 1
    about = {"prompt": "a dog", "points": [[3, 4], [9, 9]], "mask": mask}
    (sample / "meta_data.pkl").write_bytes(pickle.dumps(about))
    results = tmp_path / "results/animals"
    results.mkdir(parents=True)
    noise(5).save(results / "one.png")
    assert evaluated(tmp_path / "drag", results.parent, tmp_path)[0] == 2
    assert "--allow_pickle" in capsys.readouterr().err
    code, found = evaluated(tmp_path / "drag", results.parent, tmp_path, "--allow_pickle")
    assert code == 0 and found["benchmark"] == "DragBench" and found["rows"][0]["mse"] == 0
    name, items = read_benchmark(tmp_path / "drag", allow_pickle=True)
    assert torch.equal(items[0].mask, torch.from_numpy(mask > 0)) and items[0].source_prompt == "a dog"
    assert items[0].points == (((3.0, 4.0), (9.0, 9.0)),)
    (sample / "meta_data.pkl").write_bytes(pickle.dumps({"mask": print}))
    with pytest.raises(UserError, match="more than arrays and plain values"):
        read_benchmark(tmp_path / "drag", allow_pickle=True)


def test_points_are_found_where_they_went():
    """A penguin moved by 38 px is found within a cell of 8 px of the features; unmoved, the distance is the 38 px.

    The embedded model's features see where a thing is more than what it is: of four scenes only this one is found.
    """
    scene = random_scene(2, split="benchmark-test", objects=1).with_object(0, size=0.4, x=0.3, y=0.5)
    moved = scene.with_object_shifted(0, 0.3, 0)
    source, dragged = (to_pixels(Image.fromarray(render(one, 128)[0])) / 2 + 0.5 for one in (scene, moved))
    matching = PointMatching(StableDiffusion.load(), draws=4)  # of one draw, a point may match elsewhere
    points = [((38 + dx, 64 + dy), (76 + dx, 64 + dy)) for dx in (-10, 10) for dy in (-10, 10)]
    assert max(matching.distances(source, dragged, points)) <= 8
    assert matching.distances(source, source, points) == pytest.approx([38] * 4, abs=8)


def test_the_mean_distance_is_over_the_points_of_all_pictures():
    """As DragDiffusion's run_eval_point_matching.py has it: 30 px once and 2 px four times are 7.6 px, not 16."""
    matching = SimpleNamespace(distances=lambda source, edited, points, prompt: [target[0] for _, target in points])
    column, pixels = drag_metrics(Unavailable("none"), matching)[0], torch.zeros(1, 3, 8, 8)
    drags = ((((0, 0), (30.0, 0)),), (((0, 0), (2.0, 0)),) * 4)
    rows = [{column.name: column.measure(ImagePair(pixels, pixels, points=points))} for points in drags]
    rows.append({column.name: "not measured: no points"})
    found = summarize(rows, [column])[column.name]
    assert rows[1][column.name] == [2.0] * 4 and found["mean"] == pytest.approx(7.6) and found["n"] == 2
    assert (found["low"], found["high"]) == (2.0, 30.0)  # pictures are drawn whole: a quarter of the draws is twice one


def test_results_lie_where_the_published_programs_put_them(tmp_path):
    item = BenchmarkItem("animals/one", tmp_path, "animals/one")
    for place in ("one.jpg", "animals/one/dragged_image.png", "annotation_images/animals/one.png", "animals/one.webp"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).touch()
        assert find_result(tmp_path, item) == tmp_path / place  # each goes before those above


def test_a_folder_of_something_else_is_refused(tmp_path):
    with pytest.raises(UserError, match="is no benchmark"):
        read_benchmark(tmp_path)


def test_bootstrap_interval_agrees_with_the_normal_one_on_normal_data():
    values = np.random.default_rng(1).normal(3, 2, 400)
    low, high = mean_interval(values.tolist())
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.02)  # a tenth of `half`
    assert mean_interval([1.0]) == (-math.inf, math.inf)
    assert mean_interval([[value] for value in values]) == (low, high)
