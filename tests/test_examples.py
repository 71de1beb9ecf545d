"""Every example runs, on random weights."""

from __future__ import annotations

import inspect

import pytest
from tests.lora_states import random_adapter
from tests.tiny import tiny, tiny_folder

from personalize.launching import home, load_script
from personalize.learning import Recipe

EXAMPLES = sorted((home() / "examples").glob("*.py"))
ARGUMENTS = {
    "train_and_edit": lambda place, base: {"output_dir": place / "out", "base": base, "recipe": Recipe(rank=2, max_train_samples=2, train_batch_size=1), "steps": 2},
    "stock_pipeline": lambda place, base: {"adapter": random_adapter(tiny("sd1")).save(place / "adapter"), "base": base, "steps": 2},
}  # fmt: skip


def test_there_are_examples():
    assert {path.stem for path in EXAMPLES} == set(ARGUMENTS)


@pytest.mark.parametrize("path", EXAMPLES, ids=[path.stem for path in EXAMPLES])
def test_it_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main = load_script(path).main
    made = main(**ARGUMENTS[path.stem](tmp_path, tiny_folder("sd1", tmp_path)))
    picture = made[0] if isinstance(made, list) else made
    assert picture.size == (64, 64)
    assert list(tmp_path.rglob("*.png")), "an example leaves a picture behind"


@pytest.mark.parametrize("path", EXAMPLES, ids=[path.stem for path in EXAMPLES])
def test_it_is_short(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 40 and inspect.getdoc(load_script(path))
