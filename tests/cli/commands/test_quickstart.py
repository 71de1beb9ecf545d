"""`personalize quickstart` from end to end on a tiny random base."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from personalize.cli.commands import quickstart
from personalize.cli.main import main
from personalize.editing.config import Sampling
from personalize.embedded.samples import bundled
from personalize.embedded.scenes import HELD_OUT_STYLE, captions
from personalize.errors import UserError
from personalize.io.images import psnr, to_pixels
from tests.support.tiny import tiny_folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_folder("sd1", tmp_path_factory.mktemp("base"))


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(quickstart, "SAMPLING", Sampling(steps=1))
    monkeypatch.setattr(quickstart, "accelerator", lambda model: None)  # one precision to a process is its rule


def run(base, place, *words: str) -> int:
    extra = ["--pretrained_model_name_or_path", str(base), "--max_train_steps", "1"]
    return main(["quickstart", *words, "--output_dir", str(place), *extra])


def test_it_leaves_an_adapter_and_a_sheet_and_says_where(base, tmp_path, capsys):
    assert run(base, tmp_path / "out") == 0
    printed = capsys.readouterr().out
    adapter = json.loads((tmp_path / "out" / "adapter" / "adapter.json").read_text())
    assert adapter["caption"] == bundled(0).caption and adapter["updates"] == 1
    sheet = Image.open(tmp_path / "out" / "sheet.png")
    assert sheet.width > 4 * 192 and sheet.height > 3 * 192
    singles = {path.stem for path in (tmp_path / "out" / "pictures").iterdir()}
    assert singles == {"source", "replay", "base", *(f"edit-{number:03d}" for number in range(8))}
    for words in ("Reconstruction:", "Edits to reconstruction", "Contact sheet:", "personalize edit", "24 dB"):
        assert words in printed
    assert main(["verify", str(tmp_path / "out" / "adapter"), "--base", str(base)]) == 0


def test_on_the_embedded_model_a_row_is_chosen_as_auto_does(tmp_path, capsys):
    assert main(["quickstart", "--max_train_steps", "1", "--output_dir", str(tmp_path)]) == 0
    printed, edits = capsys.readouterr().out, bundled(0).edits
    assert {path.stem for path in (tmp_path / "pictures").iterdir()} >= {f"edit-{number:03d}" for number in range(12)}
    assert all(f"Chosen for “{one.prompt}”: alpha 0." in printed for one in edits)
    assert f"Edits to reconstruction, {quickstart.CHOSEN}:" in printed


@pytest.mark.parametrize(
    ("caption", "subject"),
    [
        ("a photo of a dog", "a photo of a dog"),
        ("a dog in the park", "a dog"),
        ("A cat on a mat at the window.", "A cat"),
        ("a picture of a fox on a blue background", "a picture of a fox"),
        ("my mug, red", "my mug, red"),
        ("on the grass", "on the grass"),
        ("a hand in hand", "a hand in hand"),
    ],
)
def test_other_places_take_the_place_of_the_captions(caption, subject, tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    example = quickstart.own_example(tmp_path / "a.png", caption)
    assert example.caption == caption
    assert [one.prompt for one in example.edits] == [
        f"{subject} on the beach", f"{subject} in the snow", f"{subject} on a red background"
    ]  # fmt: skip


def test_the_users_own_pictures_are_not_replaced(base, tmp_path, capsys):
    names = ("sheet.png", "pictures/source.png", "pictures/edit-000.png")
    (tmp_path / "pictures").mkdir()
    for number, name in enumerate(names):
        Image.new("RGB", (64, 64), (90 * number, 0, 0)).save(tmp_path / name)
    own = {name: (tmp_path / name).read_bytes() for name in names}
    assert run(base, tmp_path, str(tmp_path / "pictures" / "source.png"), "--caption", "a red square") == 0
    assert {name: (tmp_path / name).read_bytes() for name in names} == own
    assert (tmp_path / "pictures" / "source-001.png").is_file() and (tmp_path / "pictures" / "replay-001.png").is_file()
    assert str(tmp_path / "sheet-001.png") in capsys.readouterr().out


def test_a_photo_of_any_shape_with_a_caption_beside_it(base, tmp_path):
    colours = np.random.default_rng(0).integers(0, 255, (90, 160, 4), np.uint8)
    Image.fromarray(colours, "RGBA").save(tmp_path / "dog.png")
    (tmp_path / "dog.txt").write_text("a dog in the park")
    assert run(base, tmp_path / "out", str(tmp_path / "dog.png")) == 0
    source = Image.open(tmp_path / "out" / "adapter" / "source.png")
    assert source.width > source.height, "the aspect ratio is kept"


@pytest.mark.parametrize(
    ("width", "height"), [(100, 60), *(pytest.param(*one, marks=pytest.mark.slow) for one in ((60, 100), (200, 60)))]
)
def test_a_photo_is_learned_to_its_edges(base, tmp_path, width, height):
    """Its ends were cut off, and the figures counted what was left; now it is padded, which does not count."""
    photo = Image.new("RGB", (width, height), "teal")
    for left, top in ((0, 0), (width - 8, 0), (0, height - 8), (width - 8, height - 8)):
        photo.paste("red", (left, top, left + 8, top + 8))
    photo.save(tmp_path / "dog.png")
    assert run(base, tmp_path / "out", str(tmp_path / "dog.png"), "--caption", "a dog") == 0
    source, replay = (to_pixels(Image.open(tmp_path / "out" / "pictures" / f"{n}.png")) for n in ("source", "replay"))
    scale = min(source.shape[-1] / width, source.shape[-2] / height)
    h, w = round(height * scale), round(width * scale)
    own = source[..., :h, :w]
    red = (own[0, 0] > 0.3) & (own[0, 1] < -0.2)
    assert float(red.float().mean()) == pytest.approx(4 * 64 / (width * height), rel=0.3)  # blurred by a pixel
    card = json.loads((tmp_path / "out" / "adapter" / "adapter.json").read_text())
    assert card["reconstruction_db"] == pytest.approx(psnr(replay[..., :h, :w], own), abs=0.1)  # of 8-bit files


@pytest.mark.parametrize(
    ("words", "message"),
    [(["missing.png"], "no such file"), (["--scene", "9"], "choose 0 to 4"), (["--max_train_steps", "0"], "from 1 to")],
)
def test_mistakes_are_one_line_and_leave_nothing(base, tmp_path, capsys, words, message):
    extra = [] if "--max_train_steps" in words else ["--max_train_steps", "1"]
    place = ["--output_dir", str(tmp_path / "out"), "--pretrained_model_name_or_path", str(base)]
    assert main(["quickstart", *words, *place, *extra]) == 2
    line = capsys.readouterr().err.strip()
    assert message in line and "\n" not in line
    assert not (tmp_path / "out").exists()


def test_the_bundled_scenes_are_of_the_held_out_style_and_their_edits_true():
    for index in range(5):
        example = bundled(index)
        assert example.scene is not None and example.scene.objects[0].style == HELD_OUT_STYLE
        assert example.caption in captions(example.scene) and len(example.edits) == 4
        assert all(change.truth is not None and change.prompt in captions(change.truth) for change in example.edits)
        assert {change.kind for change in example.edits} == {"background", "object", "style"}
    with pytest.raises(UserError, match="choose 0 to 4"):
        bundled(5)
