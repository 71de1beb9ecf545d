"""What the tab Learn says of a training before it starts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from personalize.studio.learning import check_run, distinct
from tests.support.tiny import tiny


def test_each_of_several_pictures_has_its_size_and_its_caption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The caption of the last one alone was shown, and pictures of one name in two folders as one."""
    monkeypatch.chdir(tmp_path)
    for path, words in (("a/1.png", "a cat"), ("b/1.png", "a dog"), ("2.png", "a fox")):
        Path(path).parent.mkdir(exist_ok=True)
        Image.new("RGB", (64, 64)).save(path)
        Path(path).with_suffix(".txt").write_text(words)
    words = ["train", "single_image", "a/1.png", "b/1.png", "2.png", "--rank=2", "--targets=attention"]
    words += ["--output_dir=x"]
    rows = check_run(words, SimpleNamespace(model=lambda _: tiny("sd1")))  # pyright: ignore[reportArgumentType]
    assert {name for name, size in rows.items() if size == "64×64 px"} == {"a/1.png", "b/1.png", "2.png"}
    read = {name: text for name, text in rows.items() if name.startswith("Caption")}
    assert list(read) == [f"Caption of {name}, as the base reads it" for name in ("a/1.png", "b/1.png", "2.png")]
    assert len({*read.values()}) == 3


def test_a_picture_in_several_rows_is_told_apart_by_its_number() -> None:
    found = distinct(["1.png", "1.png", "2.png", "1.png"], ["a/1.png", "b/1.png", "2.png", "a/1.png"])
    assert found == ["a/1.png (picture 1)", "b/1.png", "2.png", "a/1.png (picture 4)"]
