"""The options of dynamic prompts and uniform maps on the command line, on random weights."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
from PIL import Image

from personalize.cli.main import main
from personalize.cli.places import box
from personalize.editing.config import DynamicSettings
from personalize.editing.editor import Editor
from personalize.sampling.config import NullTextSettings
from tests.support.photos import photo
from tests.support.tiny import tiny_folder


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    place = tmp_path_factory.mktemp("words")
    photo(64, 64).save(place / "photo.png")
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    mask.save(place / "mask.png")
    return tiny_folder("sd1", place), place


def run(places, *words) -> int:
    fixed = ["--source", "a cat and a dog", "--pretrained_model_name_or_path", places[0], "--num_inference_steps", "2"]
    return main(["edit", str(places[1] / "photo.png"), *map(str, words), *map(str, fixed)])


def test_a_report_edits_nothing(places, tmp_path, capsys):
    assert run(places, "--report", "--region", f"cat={places[1] / 'mask.png'}", "--output_dir", tmp_path / "out") == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"nouns.png", "trajectories"}
    shown = capsys.readouterr().out
    assert "nouns: cat, dog" in shown and "dynamic prompts" in shown


def test_everything_is_drawn_and_written_down(places, tmp_path):
    words = ["--swap", "cat=fox", "--dpl", "--dpl_updates", "1", "--background_mask", places[1] / "mask.png",
             "--uniform", "--mask", places[1] / "mask.png", "--strict_background", "--attention_maps",
             "--fixed_point_iterations", "1"]  # fmt: skip
    assert run(places, *words, "--output_dir", tmp_path / "out") == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"edited.png", "nouns.png", "masks.png", "attention.png"} <= names
    about = json.loads((tmp_path / "out" / "edit.json").read_text())["settings"]
    assert about["dynamic"] == asdict(DynamicSettings(updates=1)) and about["uniform"]["until"] == 0.2
    # The published settings, because this base is not the embedded model.
    assert about["fixed_point"] == 1 and about["null_text"] == asdict(NullTextSettings())
    edited, before = Image.open(tmp_path / "out" / "edited.png"), Image.open(places[1] / "photo.png")
    assert edited.crop((32, 0, 64, 64)).tobytes() == before.convert("RGB").crop((32, 0, 64, 64)).tobytes()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--target", "a fox", "--mask", "0,0,99,9"], "does not lie in the picture of 64×64 px"),
        (["--target", "a fox", "--strict_background"], "belongs to --uniform"),
        (["--target", "a fox", "--controller", "mutual", "--dpl"], "no source prompt"),
        (["--target", "a fox", "--controller", "mutual", "--weight", "fox=2"], "belong to the controller p2p"),
        (["--target", "a fox", "--dpl", "--nouns", "cta"], "did you mean cat"),
        (["--target", "a fox", "--dpl", "--region", "cow=1,2,3,4"], "none of the nouns"),
        (["--target", "a fox", "--uniform", "--uniform_until", "0"], "no step is below the uniform maps' limit"),
        (["--swap", "cat=fox", "cat=cow"], "--swap says two things about 'cat', fox and cow"),
        (["--weight", "cat=2", "cat=0.5"], "--weight says two things about 'cat', 2.0 and 0.5"),
        (["--dpl", "--region", "cat=1,2,30,40", "Cat=30,2,60,40", "--weight", "cat=2"], "--region says two things"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(places, tmp_path, capsys, words, said):
    assert run(places, *words, "--output_dir", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not (tmp_path / "out" / "edited.png").exists()


def test_boxes():
    assert box("1,2,3,4.5") == (1, 2, 3, 4.5) and box("mask.png") is None and box("1,2,3") is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--controller", "mutual", "--attention_maps"], "belong to the controller p2p"),
        (["--inversion", "none", "--dpl"], "work along an inversion"),
        (["--inversion", "none", "--uniform"], "work along an inversion"),
        (["--inversion", "ddpm", "--fixed_point_iterations", "2"], "no fixed-point iterations of ddpm"),
    ],
)
def test_what_does_not_fit_together_is_said_before_the_base_is_loaded(
    places, tmp_path, capsys, monkeypatch, words, said
):
    monkeypatch.setattr(Editor, "configured", lambda *_: pytest.fail("the base was loaded first"))
    assert run(places, "--target", "a fox", *words, "--output_dir", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
