"""`personalize edit EDIT_PHOTO`, on random weights."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from personalize.cli import options
from personalize.cli.main import main
from personalize.cli.words import local_words, pair, weight
from personalize.editing.editor import Editor
from personalize.errors import UserError
from personalize.io import output_folder
from personalize.io.provenance import read_marks
from personalize.models.stable_diffusion import StableDiffusion
from tests.support.lora_states import random_adapter
from tests.support.photos import photo
from tests.support.tiny import tiny, tiny_folder


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    place = tmp_path_factory.mktemp("photo")
    photo().save(place / "photo.png")
    return tiny_folder("sd1", place), random_adapter(tiny("sd1")).save(place / "adapter"), place


def run(places, *words, base=None) -> int:
    fixed = ["--pretrained_model_name_or_path", base or places[0], "--num_inference_steps", "2"]
    return main(["edit", str(places[2] / "photo.png"), *map(str, words), *map(str, fixed)])


def test_it_writes_pictures_and_begins_the_next_time_where_it_ended(places, tmp_path, monkeypatch, capsys):
    asked, keep = [], StableDiffusion.predict
    monkeypatch.setattr(StableDiffusion, "predict", lambda self, *a: asked.append(len(a[0])) or keep(self, *a))
    words = ["--source", "a cat on the beach", "--output_dir", tmp_path / "out"]
    assert run(places, *words, "--swap", "cat=dog", "--weight", "dog=2", "--attention_maps", "--local", "cat=dog") == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"edited.png", "before-after.png", "attention.png", "edit.json", "trajectories"}
    assert Image.open(tmp_path / "out" / "edited.png").size == (32, 32)
    assert read_marks(tmp_path / "out" / "attention.png").source_type, "it shows the edit, which a model made"
    found = json.loads((tmp_path / "out" / "edit.json").read_text())
    assert found["target"] == "a dog on the beach" and found["weights"] == {"dog": 2.0}
    used = {name: found["settings"][name] for name in ("guidance_scale", "steps", "seed", "strength", "resolution")}
    assert used == {"guidance_scale": 7.5, "steps": 2, "seed": 0, "strength": 1.0, "resolution": 64}
    assert asked == [1, 1, 4, 4]  # up with one row, then two rows with guidance
    assert run(places, *words, "--target", "a fox on the beach") == 0
    assert asked[4:] == [4, 4]
    added = {path.name for path in (tmp_path / "out").iterdir()} - names
    assert added == {"edited-001.png", "before-after-001.png", "edit-001.json"}  # the first edit is all there
    said = capsys.readouterr().out
    assert "“a fox on the beach”" in said and "edited-001.png in" in said


def test_the_users_own_picture_is_not_replaced(places, tmp_path):
    """The photo may be called as a result is, and lie where results go."""
    mine = (places[2] / "photo.png").read_bytes()
    (tmp_path / "edited.png").write_bytes(mine)
    words = ["--source", "a cat", "--target", "a dog", "--output_dir", tmp_path, "--num_inference_steps", "2"]
    base = ["--pretrained_model_name_or_path", places[0]]
    assert main(["edit", str(tmp_path / "edited.png"), *map(str, [*words, *base])]) == 0
    assert (tmp_path / "edited.png").read_bytes() == mine and (tmp_path / "edited-001.png").is_file()


def test_an_adapter_brings_its_base_and_its_trajectory(places, tmp_path, capsys):
    words = ["--source", "a cat", "--target", "a dog", "--output_dir", tmp_path, "--inversion", "ddpm", "--seed", "3"]
    assert run(places, *words, "--adapter", places[1]) == 0 and run(places, *words) == 0
    assert len(list((tmp_path / "trajectories").iterdir())) == 2
    same = ["--source", "a cat", "--target", "A cat", "--output_dir", tmp_path]
    assert run(places, *same) == 0
    assert "Note: the target says what the source says: this is the reconstruction.\n" in capsys.readouterr().out
    assert run(places, *same, "--attention_maps", "--uniform") == 0
    said = capsys.readouterr().out
    assert "this is the reconstruction, made without attention maps and uniform maps.\n" in said


def test_a_trajectory_of_another_base_is_refused(places, tmp_path, capsys):
    words = ["--source", "a cat", "--target", "a dog", "--trajectory", tmp_path / "kept", "--output_dir"]
    assert run(places, *words, tmp_path / "one") == 0 and (tmp_path / "kept" / "trajectory.json").is_file()
    other = tiny_folder("sd2v", tmp_path)
    capsys.readouterr()
    assert run(places, *words, tmp_path / "two", base=other) == 2
    line = capsys.readouterr().err.strip()
    assert "was made with another base model" in line and "\n" not in line and not (tmp_path / "two").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--target", "a dog"], "personalize edit needs --source"),
        (["--source", "a cat"], "nothing is to change: give --target, words to --swap, or --weight of words"),
        (
            ["--source", "a cat", "--swap", "dog=cat"],
            "the word 'dog' is not in the prompt 'a cat': its words are a, cat",
        ),
        (["--source", "a cat", "--swap", "cat"], "'cat': write old=new, for example cat=dog"),
        (["--source", "a cat", "--weight", "cat=much"], "'cat=much': write word=factor, for example fluffy=3"),
        (["--source", "a cat", "--target", "a dog", "--weight", "dig=2"], "did you mean dog?"),
        (["--source", "a cat", "--target", "a dog", "--inversion", "nul"], "--inversion"),
        (["--source", "a cat", "--target", "a dog", "--cross_replace_steps", "2"], "cross_replace_steps is 2"),
        (
            ["--source", "a cat", "--target", "a dog", "--inversion", "null-text", "--null_text_rate", "0"],
            "null-text takes iterations from 1",
        ),
        (["--source", "a cat", "--prompt", "a dog"], "unknown option --prompt"),
    ],
)
def test_mistakes_are_one_line_and_code_2_and_leave_nothing(places, tmp_path, capsys, words, says):
    assert run(places, *words, "--output_dir", tmp_path / "out") == 2
    line = capsys.readouterr().err.strip()
    assert says in line and "\n" not in line and line.startswith("personalize: ") and not (tmp_path / "out").exists()


def test_edit_means_a_photo_when_it_is_given_one(capsys):
    assert options.resolve_command("edit", ["my-dog", "--prompt", "a.b"]) == "edit"
    assert options.resolve_command("edit", ["my-dog", "--negative-prompt", "blur.jpg", "--prompt", "b.png"]) == "edit"
    for words in (["--output_dir=x.png"], ["--output_dir", "x.png"], ["--source_image", "x.png"]):
        assert options.resolve_command("edit", ["my-dog", "--prompt", "a", *words]) == "edit"
    assert (
        options.resolve_command("edit", ["a.JPG"])
        == options.resolve_command("edit", ["photo", "--source", "x"])
        == options.EDIT_PHOTO
    )
    assert options.resolve_command("drag", ["a.png"]) == "drag"
    for words in (["t.csv"], ["--cpu", "t.csv"], ["--no-metadata", "T.CSV"], ["--seed", "3", "t.csv"]):
        assert options.resolve_command("edit", words) == options.EDIT_TABLE
    for words in (["my-dog", "--prompt", "t.csv"], ["my-dog", "--prompt=t.csv"], ["--output_dir", "t.csv", "my-dog"]):
        assert options.resolve_command("edit", words) == "edit"
    for words, option in ((["edit", "--help"], "--forget"), (["edit", "a.png", "--help"], "--inversion")):
        with pytest.raises(SystemExit, match="0"):
            main(words)
        text = capsys.readouterr().out
        assert option in text
    assert main(["--help"]) == 0 and "edit PHOTO" in capsys.readouterr().out


def test_pairs_and_weights():
    assert pair("cat = red dog") == ("cat", "red dog") and weight("a=b=2.5") == ("a=b", 2.5)
    for wrong in ("cat", "=dog", "cat="):
        with pytest.raises(UserError, match="write old=new"):
            pair(wrong)
    assert local_words("cat = dog") == ("cat", "dog") and local_words("cat") == ("cat", "cat")


def test_a_trajectory_that_is_not_stored_yet_is_tried_to_be_written_before_the_base_is_loaded(
    places, tmp_path, monkeypatch, capsys
):
    """A folder that held anything at all was taken for a stored one; that it cannot be written came after inverting."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    monkeypatch.setattr(Editor, "configured", lambda *_: pytest.fail("the base was loaded first"))
    keep = output_folder.write_synced

    def refused(path, content):
        if path.parent.name == "full":
            raise PermissionError(13, "Permission denied")
        keep(path, content)

    monkeypatch.setattr(output_folder, "write_synced", refused)
    words = ["--source", "a cat", "--target", "a dog", "--trajectory", tmp_path / "full"]
    assert run(places, *words, "--output_dir", tmp_path / "out") == 2
    assert "full: Permission denied" in capsys.readouterr().err
