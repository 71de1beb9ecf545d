"""`personalize evaluate` on small folders laid out like the published benchmarks."""

from __future__ import annotations

import json
import math
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from personalize.cli.main import main
from personalize.errors import UserError
from personalize.evaluation.benchmarks import decode_mask, read_benchmark, read_edit_list, size_warning
from personalize.evaluation.report import mean_interval


def noise(seed: int, size: tuple[int, int] = (64, 64)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


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


def evaluated(folder, results, tmp_path, *more):
    code = main(["evaluate", str(folder), "--results", str(results), "--output", str(tmp_path / "out.json"), *more])
    return code, json.loads((tmp_path / "out.json").read_text()) if code == 0 else None


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
    assert first["psnr"] == float("inf") and first["mse"] == 0 and first["psnr, whole frame"] < 20
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


def test_tedbench(tmp_path):
    folder = tmp_path / "ted"
    (folder / "originals").mkdir(parents=True)
    for name in ("bird.jpg", "dog.jpg"):
        noise(3).save(folder / "originals" / name)
    listed = [["bird.jpg", "A bird spreading wings."], ["bird.jpg", "Two birds."], ["dog.jpg", "A sitting dog."]]
    (folder / "input_list.json").write_text(json.dumps(listed))
    name, items = read_benchmark(folder)
    assert name == "TEdBench" and [item.result for item in items] == ["bird_0", "bird_1", "dog"]
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
    (sample / "meta_data.pkl").write_bytes(pickle.dumps({"mask": print}))
    with pytest.raises(UserError, match="more than arrays and plain values"):
        read_benchmark(tmp_path / "drag", allow_pickle=True)


def test_a_folder_of_something_else_is_refused(tmp_path):
    with pytest.raises(UserError, match="is no benchmark"):
        read_benchmark(tmp_path)


def test_bootstrap_interval_agrees_with_the_normal_one_on_normal_data():
    values = np.random.default_rng(1).normal(3, 2, 400)
    low, high = mean_interval(values.tolist())
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.02)  # a tenth of `half`
    assert mean_interval([1.0]) == (-math.inf, math.inf)
