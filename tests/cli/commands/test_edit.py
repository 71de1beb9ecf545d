"""`personalize edit --auto` from the command line, on random weights."""

from __future__ import annotations

import json
import shutil

import pytest
from PIL import Image

from personalize.adapters.adapter import Adapter
from personalize.cli.commands import edit as edit_command
from personalize.cli.main import main
from personalize.editing.config import EditStrengths
from personalize.editing.stored_strengths import remembered
from personalize.errors import UserError
from tests.support.lora_states import random_adapter
from tests.support.tiny import tiny, tiny_folder
from tests.support.tiny_scorers import clip_folder, dino_folder

PROMPT = "a dog in the snow"


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A base, an adapter with its source picture, CLIP and DINO, and where to write."""
    place = tmp_path_factory.mktemp("auto")
    source = {"source": Image.linear_gradient("L").resize((64, 64))}
    adapter = random_adapter(tiny("sd1")).save(place / "adapter", pictures=source)
    scorer = ["--clip_model", str(clip_folder(place)), "--identity_model", str(dino_folder(place))]
    return tiny_folder("sd1", place), adapter, place / "out", scorer


def edit(places, *words: str) -> int:
    base, adapter, out, _ = places
    return main(["edit", str(adapter), "--pretrained_model_name_or_path", str(base), "--output_dir", str(out),
                 "--num_inference_steps", "1", *words])  # fmt: skip


def test_auto_ranks_shows_and_remembers(places, tmp_path, capsys):
    _, adapter, out, scorer = places
    assert edit(places, "--prompt", PROMPT, "--auto", "--budget", "5", *scorer) == 0
    said = capsys.readouterr().out
    assert "Best of 5, by CLIP" in said and "Stored in" in said
    assert "5 pictures, edit-000.png to edit-004.png, and grid.png in" in said
    ranking = json.loads((out / "ranking.json").read_text())
    rows = ranking["pictures"]
    assert ranking["prompt"] == PROMPT and ranking["caption"] == "a cat on the beach" and len(rows) == 5
    assert [row["score"] for row in rows] == sorted((row["score"] for row in rows), reverse=True)
    assert all({"edit", "identity", "distance", "state", "alpha", "forget", "seed"} <= set(row) for row in rows)
    assert all("clip_score" in row["facts"] for row in rows)
    assert all(Image.open(out / row["file"]).size == (64, 64) for row in rows)
    assert Image.open(out / "grid.png").width > 4 * 192, "four to a row"
    chosen = remembered(Adapter.load(adapter).info, PROMPT)
    best = {key: rows[0][key] for key in ("alpha", "beta", "gamma", "forget", "strength")}
    assert chosen == (EditStrengths(**best), rows[0]["seed"])
    first = (out / rows[0]["file"]).read_bytes()
    assert edit(places, "--prompt", PROMPT) == 0
    assert "Using what --auto chose" in capsys.readouterr().out
    assert (out / "edit-005.png").read_bytes() == first, "what was chosen is what the next edit draws"
    again = shutil.copytree(adapter, tmp_path / "other")
    assert edit(places, "--add", str(again), "--prompt", "a dog", "--auto", "--budget", "1", *scorer) == 0
    said = capsys.readouterr().out
    assert "Stored" not in said and remembered(Adapter.load(adapter).info, "a dog") is None
    assert "used together have no source embedding: that of adapter and other is left out\n" in said


def test_options_of_a_source_embedding_are_said_to_change_nothing_without_one(places, tmp_path, capsys):
    """A grid over them showed the same edit over and over, as if they had been tried."""
    base, adapter, out, _ = places
    words = ("--prompt", "a dog", "--alpha", "0.8", "--beta", "1.4")
    assert edit(places, *words) == 0
    assert "nothing" not in capsys.readouterr().out
    assert edit((base, adapter / "adapter.safetensors", tmp_path, ()), *words) == 0
    assert "Without a source embedding --alpha and --beta change nothing\n" in capsys.readouterr().out
    again = ("--from", str(tmp_path / "edit-000.png"))
    assert main(["edit", str(adapter / "adapter.safetensors"), *again, "--pretrained_model_name_or_path", str(base),
                 "--output_dir", str(tmp_path)]) == 0  # fmt: skip
    assert "nothing" not in capsys.readouterr().out, "a picture holds all of its settings"


def test_a_search_keeps_its_pictures_where_the_adapter_cannot_be_written(places, tmp_path, capsys, monkeypatch):
    """All that was drawn was lost if the adapter lay on a disk that is read only, or was a folder of PEFT's."""

    def refuse(*_):
        raise UserError("could not write adapter.json: Read-only file system; what was there before is unchanged")

    monkeypatch.setattr(edit_command, "remember", refuse)
    words = ("--prompt", "a fox", "--auto", "--budget", "1", *places[3])
    assert edit((*places[:2], tmp_path / "out", places[3]), *words) == 0
    assert "Not stored for the next `edit` with this prompt: could not write" in capsys.readouterr().out
    peft = tmp_path / "peft"
    assert main(["convert", str(places[1] / "pytorch_lora_weights.safetensors"), "--to", "peft", "--family", "sd1",
                 "--output", str(peft)]) == 0  # fmt: skip
    source = ("--source_image", str(places[1] / "source.png"))
    assert edit((places[0], peft, tmp_path / "out", places[3]), *words, *source) == 0
    assert {"edit-000.png", "edit-001.png"} < {path.name for path in (tmp_path / "out").iterdir()}


def test_edits_are_numbered_on_and_nothing_is_replaced(places, tmp_path, capsys):
    """The second edit into the default folder took away the pictures of the first."""
    (tmp_path / "grid.png").write_bytes(b"mine")
    for count in ("2", "1"):
        assert edit((*places[:2], tmp_path, []), "--prompt", PROMPT, "--num_images", count, "--strength", "1") == 0
    said = capsys.readouterr().out.splitlines()
    assert said == [f"2 pictures, edit-000.png to edit-001.png, and grid-001.png in {tmp_path}",
                    f"1 picture, edit-002.png, and grid-002.png in {tmp_path}"]  # fmt: skip
    assert (tmp_path / "grid.png").read_bytes() == b"mine"
    listed = [json.loads((tmp_path / name).read_text()) for name in ("edits-001.json", "edits-002.json")]
    assert [[entry["file"] for entry in run] for run in listed] == [["edit-000.png", "edit-001.png"], ["edit-002.png"]]
    first, third = (list(Image.open(tmp_path / f"edit-{number}.png").getdata()) for number in ("000", "002"))
    assert first == third, "the same seed"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--auto"], "need a CLIP model"),
        (["--auto", "--alpha", "0.8"], "leave out --alpha"),
        (["--auto", "--strength", "0.5"], "leave out --strength"),
        (["--auto", "--num_images", "2"], "leave out --seeds"),
        (["--auto", "--source_image", "nowhere.png"], "nowhere.png does not exist"),
        (["--clip_model", "x"], "belongs to --auto"),
    ],
)
def test_mistakes_are_one_line(places, capsys, words, message):
    scorer = places[3] if "--source_image" in words else []
    assert edit(places, "--prompt", PROMPT, *words, *scorer) == 2
    line = capsys.readouterr().err.strip()
    assert message in line and "\n" not in line


def test_a_budget_of_nothing_is_refused(places, capsys):
    assert edit(places, "--prompt", PROMPT, "--auto", "--budget", "0", *places[3]) == 2
    assert "--budget is 0: give a number from 1" in capsys.readouterr().err
