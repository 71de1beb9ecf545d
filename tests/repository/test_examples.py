"""Every example runs, on random weights."""

from __future__ import annotations

import inspect

import pytest
from PIL import Image

from personalize.cli.launch import load_script, scripts_home
from personalize.training.config import MultiConceptConfig, SingleImageConfig
from tests.support.drag_pictures import picture, square
from tests.support.lora_states import random_adapter
from tests.support.tiny import tiny, tiny_folder

EXAMPLES = sorted((scripts_home() / "examples").glob("*.py"))
SHORT = SingleImageConfig(rank=2, max_train_samples=2, samples_per_update=1)


def arguments(name, place):
    """What each example is called with: a tiny random base, two steps."""
    base = tiny_folder("sd1", place)
    if name == "train_and_edit":
        return {"output_dir": place / "out", "base": base, "config": SHORT, "steps": 2}
    if name == "catalogue":
        return {"output_dir": place / "out", "base": base, "config": SHORT, "steps": 2}
    if name == "two_concepts":
        config = MultiConceptConfig(rank=2, max_train_steps=2, samples_per_update=2)
        return {"output_dir": place / "out", "base": base, "config": config, "steps": 2}
    if name == "edit_photo":
        picture(64, 64).save(place / "photo.png")
        return {"photo": place / "photo.png", "source": "a cat", "target": "a dog", "base": base, "steps": 2}
    if name == "drag_point":
        picture(64, 64).save(place / "photo.png")
        square().save(place / "mask.png")  # random weights tell no thing from its background
        points = {"handle": "20,24", "target": "36,28", "mask": place / "mask.png"}
        return {"photo": place / "photo.png", **points, "base": base, "steps": 3}
    return {"adapter": random_adapter(tiny("sd1")).save(place / "adapter"), "base": base, "steps": 2}


def test_there_are_examples():
    assert {path.stem for path in EXAMPLES} == {
        "catalogue", "drag_point", "edit_photo", "stock_pipeline", "train_and_edit", "two_concepts"
    }  # fmt: skip


LONG = {"catalogue", "two_concepts"}  # learn two adapters, or tokens and regularisation


@pytest.mark.parametrize(
    "path", [pytest.param(p, id=p.stem, marks=[pytest.mark.slow] if p.stem in LONG else []) for p in EXAMPLES]
)
def test_it_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main = load_script(path).main
    shown = main(**arguments(path.stem, tmp_path))
    assert shown.size == (64, 64)
    assert list(tmp_path.rglob("*.png")), "an example leaves a picture behind"


def test_the_first_example_learns_all_of_a_photo(tmp_path, monkeypatch):
    """80×64 px in a bucket of 64×64 or 64×96: neither the red column at the left nor the blue at the right is cut."""
    photo = Image.new("RGB", (80, 64), "gray")
    photo.paste("red", (0, 0, 4, 64))
    photo.paste("blue", (76, 0, 80, 64))
    photo.save(tmp_path / "photo.png")
    script = load_script(scripts_home() / "examples" / "train_and_edit.py")
    seen = []

    def learned(model, pixels, *arguments):
        seen.extend(pixels)
        return random_adapter(model)

    monkeypatch.setattr(script, "learn", learned)
    script.main(str(tmp_path / "photo.png"), "a cat", **arguments("train_and_edit", tmp_path))
    (image,) = seen
    own = image.own_part(image.pixels)[0]
    assert own[0, :, 0].min() > 0.5 > own[2, :, 0].max() and own[2, :, -1].min() > 0.5 > own[0, :, -1].max()


@pytest.mark.parametrize("path", EXAMPLES, ids=[path.stem for path in EXAMPLES])
def test_it_is_short(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 40 and inspect.getdoc(load_script(path))
