"""The manual's pictures are of the weights that ship and of the commands that stand there."""

from __future__ import annotations

import json
import re

import pytest
from PIL import Image

from tests.bench import manual

INPUTS = {"car.png", "cat.png", "fox.png"}  # shown beside what was learned of them


def test_pictures_are_of_the_weights_that_ship_and_of_the_commands_that_stand_there():
    stale = manual.out_of_date(json.loads(manual.RECORD.read_text(encoding="utf-8")), manual.stamp())
    assert not stale, "python -m tests.bench.manual --run"


def test_every_picture_of_the_manual_is_made_by_a_command_and_every_one_made_is_shown():
    text = manual.MANUAL.read_text(encoding="utf-8")
    linked = set(re.findall(r"(?<!examples/)pictures/([\w-]+\.\w+)", text))
    assert linked - INPUTS == {*manual.PICTURES, *manual.SCREENSHOTS}


def test_commands_run_once_and_a_failed_one_ends_the_run(tmp_path, monkeypatch):
    commands = ("# runs here\nmkdir -p runs; echo x >> runs/count", "false", "# runs here\nls no")
    (tmp_path / "README.md").write_text("".join(f"```bash\n{one}\n```\n" for one in commands))
    monkeypatch.setattr(manual, "MANUAL", tmp_path / "README.md")
    for _ in range(2):
        with pytest.raises(SystemExit, match="exit code 2"):
            manual.make(tmp_path)
    assert (tmp_path / "runs" / "count").read_text() == "x\n"


def test_pictures_are_stored_as_their_names_say(tmp_path, monkeypatch):
    monkeypatch.setattr(manual, "PLACE", tmp_path)
    Image.new("RGBA", (20, 10), "teal").save(tmp_path / "made.png")
    manual.take({"a.webp": "made.png", "b.png": "made.png"}, tmp_path)
    assert [Image.open(tmp_path / name).format for name in ("a.webp", "b.png")] == ["WEBP", "PNG"]
