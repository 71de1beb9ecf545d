"""`personalize train catalogue` from the command line, alone and in two processes."""

from __future__ import annotations

import csv
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from accelerate.state import AcceleratorState
from PIL import Image

from personalize.adapters.adapter import Adapter
from personalize.cli.launch import load_script, scripts_home
from personalize.cli.main import main
from personalize.cli.parser import parse
from personalize.errors import Notice
from personalize.training import catalogue
from tests.support.tiny import tiny_folder

SCRIPT = load_script(scripts_home() / "train" / "catalogue.py")


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("shop")
    tiny_folder("sd1", place)
    for number in range(3):
        Image.new("RGB", (64, 64), (80 * number, 60, 60)).save(place / f"{number}.png")
    rows = [f"{number}.png,a photo of a cat,item-{number},{2 + number}" for number in range(3)]
    (place / "items.csv").write_text("\n".join(["image,caption,name,rank", *rows]))
    (place / "bad.csv").write_text("\n".join(["image,caption,name,rank", *rows, "gone.png,a cat,gone,"]))
    return place


def line(shop: Path, table: str, output: Path) -> list[str]:
    options = {"pretrained_model_name_or_path": shop / "tiny-sd1", "output_dir": output, "targets": "attention",
               "max_train_samples": 2, "samples_per_update": 1}  # fmt: skip
    return ["train", "catalogue", str(shop / table), *(f"--{name}={value}" for name, value in options.items())]


def test_every_row_becomes_an_adapter_and_bad_ones_show_in_the_exit_code(shop, tmp_path, capsys):
    assert main(line(shop, "items.csv", tmp_path)) == 0
    assert [Adapter.load(tmp_path / f"item-{number}").rank for number in range(3)] == [2, 3, 4]
    assert "3 of 3 rows learned" in capsys.readouterr().out
    assert main(line(shop, "bad.csv", tmp_path)) == 2
    said = capsys.readouterr()
    assert "3 of 3 rows are finished already" in said.out
    assert (
        said.err.strip()
        == f"personalize: 1 of 4 rows failed, see {tmp_path / 'results.csv'}; mend them and start again"
    )
    written = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert [row["status"] for row in written] == ["done", "done", "done", "failed"]


@pytest.mark.parametrize(("column", "noticed"), [("", True), ("with_prior_preservation", False)])
def test_class_pictures_of_no_row_are_a_notice_as_of_one_picture(column, noticed, shop, tmp_path, monkeypatch, recwarn):
    """The folder was not looked at, and nothing said so."""
    (shop / "one.csv").write_text(f"image,caption,{column or 'name'}\n0.png,a cat,{'true' if column else 'x'}")
    monkeypatch.setattr(catalogue, "learn_catalogue", lambda *_: [])
    options = [str(shop / "one.csv"), f"--output_dir={tmp_path}", "--class_data_dir=cats", "--class_prompt=a cat"]
    (shop / "cats").mkdir(exist_ok=True)
    Image.new("RGB", (64, 64)).save(shop / "cats" / "any.png")
    monkeypatch.chdir(shop)
    config = parse(SCRIPT.Config, options, prog="catalogue")
    said = "nothing comes of --class_prompt and --class_data_dir"
    SCRIPT.main(config)
    assert any(said in str(one.message) for one in recwarn.list if one.category is Notice) == noticed


@pytest.mark.parametrize(("column", "noticed"), [("name", True), ("use_ema", False)])
def test_options_of_which_nothing_comes_in_any_row_are_a_notice(column, noticed, shop, tmp_path, monkeypatch, recwarn):
    """single_image said so, and a catalogue took them without a word."""
    (shop / "one.csv").write_text(f"image,caption,{column}\n0.png,a cat,true")
    monkeypatch.setattr(catalogue, "learn_catalogue", lambda *_: [])
    monkeypatch.chdir(shop)
    options = [str(shop / "one.csv"), f"--output_dir={tmp_path}", "--ema_max_decay=0.9", "--prior_loss_weight=0.5"]
    SCRIPT.main(parse(SCRIPT.Config, options, prog="catalogue"))
    said = [str(one.message) for one in recwarn.list if one.category is Notice]
    assert ("nothing comes of --ema_max_decay without --use_ema" in said) == noticed
    assert "nothing comes of --prior_loss_weight without --with_prior_preservation" in said


@pytest.mark.slow
def test_another_way_to_load_the_base_learns_the_rows_again(shop, tmp_path, capsys, monkeypatch):
    (shop / "one.csv").write_text("image,caption\n0.png,a photo of a cat")
    command = line(shop, "one.csv", tmp_path)
    assert main([*command, "--prediction_type", "epsilon"]) == 0
    assert main([*command, "--prediction_type", "v_prediction"]) == 0
    assert "finished already" not in capsys.readouterr().out
    AcceleratorState._reset_state()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # as `accelerate launch` says it
    assert main([*command, "--prediction_type", "v_prediction"]) == 0
    assert "finished already" not in capsys.readouterr().out
    assert Adapter.load(tmp_path / "0").info["mixed_precision"] == "bf16"
    assert main([*command, "--prediction_type", "v_prediction", "--mixed_precision", "bf16"]) == 0
    assert "1 of 1 rows are finished already" in capsys.readouterr().out
    AcceleratorState._reset_state()


@pytest.mark.parametrize(
    "path", sorted((scripts_home() / "configs").glob("*/catalogue.yaml")), ids=lambda path: path.parent.name
)
def test_presets_are_those_of_one_picture(path):
    single = yaml.safe_load((path.parent / "single_image.yaml").read_text()) or {}
    known = {one.name for one in fields(SCRIPT.Config)}
    assert (yaml.safe_load(path.read_text()) or {}) == {key: value for key, value in single.items() if key in known}


@pytest.mark.slow  # two processes that import torch anew
def test_two_processes_share_the_rows_and_learn_what_one_does(shop, tmp_path):
    command = [sys.executable, "-m", "personalize", *line(shop, "bad.csv", tmp_path / "two"), "--num_processes", "2"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert process.returncode == 2 and "1 of 4 rows failed" in process.stderr, process.stderr
    results = [path.read_text().splitlines() for path in sorted((tmp_path / "two" / "results").glob("*.jsonl"))]
    assert sorted(len(rows) for rows in results) == [1, 3], "two rows and the refused one here, one row there"
    assert main(line(shop, "items.csv", tmp_path / "one")) == 0
    for number in range(3):
        one, two = (Adapter.load(tmp_path / way / f"item-{number}").lora for way in ("one", "two"))
        assert max(float((one[key] - two[key]).abs().max()) for key in one) <= 1e-6  # other threads, other sums
