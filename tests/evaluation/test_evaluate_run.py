"""`personalize evaluate --run`: results are made once, by one method, and only by options that decide them."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from personalize.cli.commands import evaluate_run
from tests.support.benchmarks import evaluated, noise, scene_folder
from tests.support.tiny import tiny_folder

FEW = "--num_inference_steps 2 --cpu"
RUNS = {"pie": FEW, "ted": f"{FEW} --controller mutual", "drag": FEW}


@pytest.mark.parametrize("kind", ["pie", "ted", pytest.param("drag", marks=pytest.mark.slow)])
def test_run_makes_what_is_missing_goes_on_and_mixes_no_methods(kind: str, tmp_path, capsys):
    folder, results = scene_folder(tmp_path / "bench", kind), tmp_path / "made"
    tiny = "" if kind == "drag" else tiny_folder("sd1", tmp_path / "tiny")  # random attention finds no thing to drag
    options = f"{RUNS[kind]} --pretrained_model_name_or_path '{tiny}' --resolution 64" if tiny else RUNS[kind]
    code, found = evaluated(folder, results, tmp_path, f"--run={options}", "--point_model", "embedded", "--cpu")
    assert code == 0 and found["measured"] == 2, capsys.readouterr().err
    assert Image.open(results / "two.png").size == (160, 96)
    if kind == "drag":
        assert all(isinstance(row["mean distance, px"][0], float) for row in found["rows"])
    kept = (results / "one.png").stat().st_mtime_ns
    (results / "two.png").unlink()
    capsys.readouterr()
    assert evaluated(folder, results, tmp_path, f"--run={options}", "--cpu")[0] == 0
    assert "1 of 1: two" in capsys.readouterr().out
    assert (results / "one.png").stat().st_mtime_ns == kept and (results / "two.png").is_file()
    (results / "two.png").unlink()
    assert evaluated(folder, results, tmp_path, f"--run={options} --seed 3", "--cpu")[0] == 2
    assert f"results of {found['benchmark']} made with --run" in capsys.readouterr().err


def test_run_says_before_the_work_what_is_wrong_with_its_options(tmp_path, capsys):
    folder = scene_folder(tmp_path / "bench", "ted")
    for run, words in ((FEW, "no source prompt"), ("--inversion dddim", "dddim"), ("--nonsense 3", "--nonsense")):
        assert evaluated(folder, tmp_path / "made", tmp_path, f"--run={run}")[0] == 2
        assert words in capsys.readouterr().err and not (tmp_path / "made").exists()


def test_run_checks_each_item_and_takes_the_processor_that_evaluate_takes(tmp_path, capsys, monkeypatch):
    folder = scene_folder(tmp_path / "bench", "pie")
    for run, words in (("--swap cat=dog", "two ways to say one thing"), ("--mask nowhere.png", "nowhere.png")):
        assert evaluated(folder, tmp_path / "made", tmp_path, f"--run={run}")[0] == 2
        assert words in capsys.readouterr().err and not (tmp_path / "made").exists()
    (folder / "annotation_images" / "one.png").write_text("no picture")
    seen = []
    monkeypatch.setattr(
        "personalize.cli.commands.evaluate_run.Editor.configured", lambda options, adapters: seen.append(options)
    )
    monkeypatch.setattr(evaluate_run, "_edited", lambda editor, options: noise(options.seed, (160, 96)))
    assert evaluated(folder, tmp_path / "made", tmp_path, "--run=", "--cpu")[0] == 0
    assert [options.cpu for options in seen] == [True]
    assert "one: not made: " in capsys.readouterr().out and (tmp_path / "made" / "two.png").is_file()


@pytest.fixture
def quick(monkeypatch):
    """Pictures without a model, and the list of the options that made them."""
    made = []
    monkeypatch.setattr(evaluate_run.Editor, "configured", lambda options, adapters: None)
    monkeypatch.setattr(
        evaluate_run, "_edited", lambda editor, options: made.append(options) or noise(options.seed, (160, 96))
    )
    return made


def test_a_complete_folder_of_results_of_other_options_is_refused(tmp_path, capsys, quick):
    folder, results = scene_folder(tmp_path / "bench", "pie"), tmp_path / "made"
    assert evaluated(folder, results, tmp_path, "--run=--seed 1", "--cpu")[0] == 0 and len(quick) == 2
    assert evaluated(folder, results, tmp_path, "--run=--seed 1", "--cpu")[0] == 0 and len(quick) == 2
    capsys.readouterr()
    for run, words in (("--seed 2", 'made with --run "--seed 1": give that again'), ("--sede 1", "--sede")):
        assert evaluated(folder, results, tmp_path, f"--run={run}", "--cpu")[0] == 2
        assert words in capsys.readouterr().err
    assert json.loads((results / "run.json").read_text())["options"] == ["--seed", "1"] and len(quick) == 2


def test_results_of_an_adapter_that_has_changed_are_not_gone_on_with(tmp_path, capsys, quick):
    """An adapter trained again between two runs made the rest of the results, and the first ones counted as its own."""
    folder, results, adapter = scene_folder(tmp_path / "bench", "pie"), tmp_path / "made", tmp_path / "x.safetensors"
    run = f"--run=--adapter {adapter}"
    adapter.write_bytes(b"1")
    assert evaluated(folder, results, tmp_path, run, "--cpu")[0] == 0 and len(quick) == 2
    (results / "two.png").unlink()
    assert evaluated(folder, results, tmp_path, run, "--cpu")[0] == 0 and len(quick) == 3
    (results / "two.png").unlink()
    adapter.write_bytes(b"2")
    capsys.readouterr()
    assert evaluated(folder, results, tmp_path, run, "--cpu")[0] == 2 and len(quick) == 3
    assert "holds results of an adapter that has changed since" in capsys.readouterr().err


def test_results_of_unknown_origin_are_not_claimed(tmp_path, capsys, quick):
    folder, results = scene_folder(tmp_path / "bench", "pie"), tmp_path / "made"
    results.mkdir()
    for name in ("one", "two"):  # one of two results, then both
        noise(3, (160, 96)).save(results / f"{name}.png")
        assert evaluated(folder, results, tmp_path, "--run=", "--cpu")[0] == 2
        assert "holds results such as one.png, but no run.json" in capsys.readouterr().err
        assert not (results / "run.json").exists() and not quick
    assert evaluated(folder, results, tmp_path, "--cpu")[0] == 0  # to measure them is another matter


def test_a_record_of_a_run_that_made_nothing_binds_nobody(tmp_path, quick):
    folder, results = scene_folder(tmp_path / "bench", "pie"), tmp_path / "made"
    results.mkdir()
    (results / "run.json").write_text(json.dumps({"benchmark": "PIE-Bench", "options": ["--seed", "7"]}))
    assert evaluated(folder, results, tmp_path, "--run=--seed 1", "--cpu")[0] == 0 and len(quick) == 2
    assert json.loads((results / "run.json").read_text())["options"] == ["--seed", "1"]


SIGNED = "--c2pa cert.pem key.pem"
ONLY = ("--keep_exif", "--no_metadata", "--no_provenance", SIGNED, "--output_dir elsewhere")
NO_DIFFERENCE = {
    "pie": ("--report", "--attention_maps", "--trajectory kept", "--from one.png", *ONLY),
    "drag": ("--preview", *ONLY),
}


@pytest.mark.parametrize(
    ("kind", "option"), [(kind, option) for kind, every in NO_DIFFERENCE.items() for option in every]
)
def test_options_that_make_no_difference_are_refused(kind, option, tmp_path, capsys):
    folder = scene_folder(tmp_path / "bench", kind)
    assert evaluated(folder, tmp_path / "made", tmp_path, f"--run={option}")[0] == 2
    said = capsys.readouterr().err.strip()
    assert f"--run has {option.split()[0]}, which makes no difference" in said and "\n" not in said
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("kind", "option", "words"),
    [
        ("pie", "--target 'a cow'", "the target 'a cow'"), ("pie", "other.png", "the target 'other.png'"),
        ("drag", "--from 1,2 --to 3,4", "the point 3,4"), ("drag", "--to 5,6", "the point 5,6"),
    ],
)  # fmt: skip
def test_what_the_benchmark_says_is_not_said_once_more(kind, option, words, tmp_path, capsys):
    folder = scene_folder(tmp_path / "bench", kind)
    assert evaluated(folder, tmp_path / "made", tmp_path, f"--run={option}")[0] == 2
    assert f"--run has {words}: leave it out" in capsys.readouterr().err and not (tmp_path / "made").exists()
