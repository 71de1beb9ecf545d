"""How a picture is drawn again, as `inspect` says it."""

from __future__ import annotations

import shlex
from pathlib import Path

from PIL import Image

from personalize.cli.main import main
from tests.support.lora_states import random_adapter
from tests.support.tiny import tiny, tiny_folder

PROMPT = "a dog in the snow"


def run(base: str, out: Path | str, *words: object) -> int:
    more = ["--pretrained_model_name_or_path", base, "--output_dir", str(out), "--num_inference_steps", "2"]
    return main([*map(str, words), *more])


def test_inspect_says_how_a_picture_is_drawn_again(tmp_path, capsys, monkeypatch):
    """Of a photo's edit it said a command that the photo is missing in, and names with spaces stood there bare."""
    base = str(tiny_folder("sd1", tmp_path))
    adapter, place = random_adapter(tiny("sd1")).save(tmp_path / "adapter"), tmp_path / "photos"
    place.mkdir()
    photo = place / "photo.jpg"
    Image.effect_noise((96, 64), 90).convert("RGB").save(photo)
    masks = {name: photo.with_name(f"{name} of it.png") for name in ("mask", "cat")}
    for path in masks.values():
        Image.new("L", (96, 64), 255).save(path)
    words = ["--source", "a cat on grass", "--swap", "cat=dog", "--mask", masks["mask"]]
    words += ["--dpl", "--dpl_updates", "0", "--region", f"cat={masks['cat']}"]
    assert run(base, tmp_path / "an edit", "edit", photo, *words) == 0
    assert run(base, tmp_path / "an edit", "edit", adapter, "--prompt", PROMPT) == 0
    monkeypatch.chdir(place)
    for name, bases in (("edited.png", 1), ("edit-000.png", 0)):
        capsys.readouterr()
        assert main(["inspect", str(tmp_path / "an edit" / name)]) == 0
        (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("draw it again: ")]
        program, *again = shlex.split(line.removeprefix("draw it again: "))
        named = [word for word in again if word.startswith("--pretrained_model_name_or_path=")]
        assert program == "personalize" and len(named) == bases, "an adapter names its base itself"
        assert run(base, "again", *(word for word in again if word not in named)) == 0
        assert Path("again", name).read_bytes() == (tmp_path / "an edit" / name).read_bytes()
