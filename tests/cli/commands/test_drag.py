"""`personalize drag`, on random weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from personalize.cli.commands.drag import drag_settings
from personalize.cli.drag_options import DragConfig
from personalize.cli.main import main
from personalize.cli.parser import parse
from personalize.cli.places import interleaved_points
from personalize.editing.drag.config import DragSettings
from personalize.editing.editor import Editor
from personalize.errors import UserError
from tests.support.drag_pictures import picture, square
from tests.support.lora_states import random_adapter
from tests.support.tiny import tiny, tiny_folder


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    place = tmp_path_factory.mktemp("drag")
    picture().save(place / "photo.png")
    square().save(place / "mask.png")
    return tiny_folder("sd1", place), random_adapter(tiny("sd1")).save(place / "adapter"), place


def run(places, *words: str) -> int:
    base, _, place = places
    fixed = ["--pretrained_model_name_or_path", base, "--output_dir", place / "out", "--num_inference_steps", "3"]
    return main(["drag", str(place / "photo.png"), *words, *map(str, fixed)])


def newest(places, pattern: str) -> Path:
    """The last of the numbered results, which all stay."""
    return max((places[2] / "out").glob(pattern), key=lambda path: path.stat().st_mtime_ns)


def test_the_command_writes_the_pictures_and_says_where_the_points_arrived(places, capsys):
    words = ["--from", "20,24", "--to", "36,28", "--from", "30,30", "--to=44,34"]
    assert run(places, *words, "--mask", str(places[2] / "mask.png"), "--mode", "deform", "--paste") == 0
    out = places[2] / "out"
    assert {path.name for path in out.iterdir()} == {"dragged.png", "mask.png", "overlay.png", "drag.json"}
    assert all(Image.open(path).size == (64, 64) for path in out.glob("*.png"))
    found = json.loads((out / "drag.json").read_text())
    assert [row["to"] for row in found["drags"]] == [[36, 28], [44, 34]] and found["seconds"] > found["edit_seconds"]
    text = capsys.readouterr().out
    assert text.count("px from the target") == 2 and "36,28: arrived at" in text and " s; dragged.png" in text


def test_an_adapter_brings_its_base(places, capsys):
    words = ["--from", "20,24", "--to", "36,28", "--adapter", str(places[1]), "--method", "latents"]
    assert run(places, *words) == 0  # random attention tells nothing from the background, which pixels would refuse
    assert json.loads(newest(places, "drag*.json").read_text())["mask_thresholds"]


def test_flags_may_be_words_of_python(capsys):
    config = parse(DragConfig, ["a.png", "--from", "1,2", "--to", "3,4", "--from=5,6", "--to=7,8"], prog="x")
    assert config.from_ == ("1,2", "5,6") and config.to == ("3,4", "7,8")
    with pytest.raises(SystemExit, match="0"):
        main(["drag", "--help"])
    assert "--from [STR [STR ...]]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "personalize drag needs --from and --to"),
        (["--from", "1,2"], "personalize drag needs --to"),
        (["--from", "1,2", "--to", "3,4", "--to", "5,6"], "1 of --from and 2 of --to: each --from needs a --to"),
        (["--from", "1,nan", "--to", "3,4"], "got '1,nan', which is no place"),
        (["--from", "1,2", "--to", "3,4", "--add", "nan,3"], "got 'nan,3', which is no place"),
        (["--from", "1,2", "--to", "3,4", "--remove", "1,2,3,4"], "a point is x,y in pixels, for example 120,64; got"),
        (["--from", "1", "--to", "3,4"], "a point is x,y in pixels, for example 120,64; got '1'"),
        (["--from", "1,2", "--to", "300,4"], "target 300,4 is outside the picture: it is 64×64 px"),
        (["--from", "1,2", "--to", "3,4", "--mask", "none.png"], "none.png: no such file"),
        (["--from", "1,2", "--to", "3,4", "--mode", "shift"], "mode"),
        (["--from", "1,2", "--to", "3,4", "--method", "latents", "--preview"], "--preview, --add and --remove need"),
        (["--from", "1,2", "--to", "3,4", "--method", "latents", "--add", "5,6"], "--preview, --add and --remove need"),
        (["--from", "1,2", "--to", "3,4", "--method", "latents", "--mode", "region"], "region needs the method pixels"),
        (["--from", "1,2", "--to", "3,4", "--grow", "2", "--shrink", "1"], "undo one another"),
        (["--form", "1,2", "--to", "3,4"], "unknown option --form: did you mean --from?"),
    ],
)
def test_mistakes_are_one_line_and_code_2(places, capsys, monkeypatch, words, message):
    monkeypatch.setattr(Editor, "configured", lambda *_: pytest.fail("the base was loaded first"))
    assert run(places, *words) == 2
    line = capsys.readouterr().err.strip()
    assert message in line and "\n" not in line and line.startswith("personalize: ")


def test_a_preview_writes_mask_warp_and_void_and_says_how_much_moves(places, capsys):
    words = ["--from", "20,24", "--to", "36,28", "--mask", str(places[2] / "mask.png"), "--preview"]
    assert run(places, *words) == 0
    for name in ("mask", "warped", "void", "overlay"):
        assert newest(places, f"{name}*.png").stat().st_mtime_ns >= newest(places, "drag*").stat().st_mtime_ns
    facts = json.loads(newest(places, "preview*.json").read_text())
    assert facts["share"] == pytest.approx(24 * 24 / 64**2, abs=1e-4) and facts["arrived"] == [[36, 28]]
    assert "moves 14.1% of the picture" in capsys.readouterr().out


def test_regions_are_boxes_and_polygons(places):
    words = ["--from", "8,8,24,24", "--to", "32,24,64,40", "--mode", "region", "--region_map", "affine", "--preview"]
    assert run(places, *words) == 0
    assert interleaved_points(("1,2,3,4,5,6",), ("2,2,4,4,6,6",)) == [
        ((1, 2), (3, 4), (5, 6)),
        ((2, 2), (4, 4), (6, 6)),
    ]


def test_options_of_the_mask_reach_the_settings():
    line = ["a.png", "--from", "1,2", "--to", "3,4"]
    assert drag_settings(parse(DragConfig, [*line, "--shrink", "2"], prog="x")).grow == -2
    with pytest.raises(UserError, match="undo one another"):
        drag_settings(parse(DragConfig, [*line, "--shrink", "2", "--grow", "1"], prog="x"))
    with pytest.raises(UserError, match="--grow is -1"):
        drag_settings(parse(DragConfig, [*line, "--grow=-1"], prog="x"))


def test_points_are_paired_in_their_order():
    assert interleaved_points(("1,2", "5,6.5"), ("3,4", "7,8")) == [(1, 2), (3, 4), (5, 6.5), (7, 8)]
    with pytest.raises(UserError, match="got '1,2,3'"):
        interleaved_points(("1,2,3",), ("4,5",))


def test_the_fill_is_as_asked_and_its_seed_counts(places):
    drawn = []
    for words in ([], ["--fill", "attention"], ["--fill", "attention", "--seed", "7"]):
        mask = ["--mask", str(places[2] / "mask.png")]
        assert run(places, "--from", "20,24", "--to", "44,34", *mask, *words) == 0
        drawn.append(newest(places, "dragged*.png").read_bytes())
    assert len(set(drawn)) == 3


def test_every_setting_that_is_an_option_reaches_the_drag():
    words = (
        "--method latents --mode deform --displacement stretch --fill bnni --clearance 2 --mask_threshold 0.4 "
        "--mask_most 0.6 --no_refine --user_mask intersect --weights winner --fill_keys all --no_protect "
        "--strength 0.8 --seed 7 --num_inference_steps 12 --shrink 2"
    )
    config = parse(DragConfig, ["a.png", "--from", "1,2", "--to", "3,4", *words.split()], prog="x")
    assert drag_settings(config) == DragSettings(
        method="latents", mode="deform", displacement="stretch", fill="bnni", clearance=2, mask_threshold=0.4,
        mask_most=0.6, refine=False, user_mask="intersect", weights="winner", fill_keys="all", protect=False,
        strength=0.8, seed=7, steps=12, grow=-2,
    )  # fmt: skip
