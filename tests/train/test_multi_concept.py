"""train/multi_concept.py on a tiny base: from a picture file to a verified adapter folder with its words."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from PIL import Image

from personalize.adapters.adapter import Adapter
from personalize.adapters.subjects import Subject
from personalize.cli.launch import load_script
from personalize.cli.main import main
from personalize.errors import UserError
from personalize.training.data.class_images import METADATA, from_base, from_dataset, from_folder
from personalize.training.data.concepts import read_subjects
from tests.support.tiny import tiny, tiny_folder

ROOT = Path(__file__).parents[2]
SCRIPT = load_script(ROOT / "train" / "multi_concept.py")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder("sd1", tmp_path_factory.mktemp("base"))


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    Image.linear_gradient("L").resize((90, 60)).convert("RGBA").save(tmp_path / "photo.png")
    for number in range(2):
        Image.new("L", (90, 60), 255 - 100 * number).save(tmp_path / f"mask{number}.png")
    return tmp_path / "photo.png"


def small(base: Path, photo: Path, output: Path) -> list[str]:
    options = {"pretrained_model_name_or_path": base, "output_dir": output, "rank": 2, "max_train_steps": 2,
               "samples_per_update": 2, "num_class_images": 2, "class_image_steps": 2,
               "class_image_cache": output.parent / "drawn", "checkpointing_steps": 1}  # fmt: skip
    return ["train", "multi_concept", str(photo), *(f"--{name}={value}" for name, value in options.items())]


WORDS = ["--concepts", "<cat1> cat", "<dog1> dog"]


def test_command_line_trains_saves_and_resumes(
    base: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    masks = [str(photo.with_name(f"mask{i}.png")) for i in range(2)]
    line = [*small(base, photo, tmp_path / "out"), *WORDS, "--masks", *masks]
    assert main([*line, "--attention_maps", "--gradient_checkpointing"]) == 0
    said = capsys.readouterr().out
    assert "“photo of a <cat1> cat and <dog1> dog” at 96×64 px, 2 regularisation" in said  # the picture is 3:2
    assert len(re.findall(r"calibrating 16×24 maps", said)) == 5 and "Words: <cat1>, <dog1>" in said
    adapter = Adapter.load(tmp_path / "out")
    assert set(adapter.concepts) == {"<cat1>", "<dog1>"} and adapter.info["regularisation"] == 2
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"cat1.safetensors", "dog1_learned_embeds.safetensors", "attention.png", "checkpoint-1"} <= names
    again = (tmp_path / "out" / "cat1.safetensors").read_bytes()
    assert main([*line, "--resume_from_checkpoint", "checkpoint-1"]) == 0
    assert "Going on from checkpoint-1" in capsys.readouterr().out
    assert (tmp_path / "out" / "cat1.safetensors").read_bytes() == again


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ([], "at least one concept"),
        (["--concepts", "cat1 cat"], "angle brackets"),
        (["--concepts", "<cat1> cat", "<cat1> dog"], "given twice"),
        ([*WORDS, "--instance_prompt", "photo of <cat1> cat"], "one “<dog1> dog”"),
        ([*WORDS, "--mask_weight", "1"], "mask_weight needs masks"),
        (["--masks", "a.png", "--calibration_weight", "0"], "masks have the weight of the calibration, which is 0"),
        ([*WORDS, "--class_data_dir", "nowhere"], "nowhere: no such folder"),
        ([*WORDS, "--num_class_images", "0"], "num_class_images must be above 0"),
        ([*WORDS, "--instance_data_dir", "."], "name one picture"),
        ([*WORDS, "--calibration_wight", "1"], "did you mean --calibration_weight"),
        ([*WORDS, "--initializer_token", "ktn++ucd"], "'ktn++ucd' has an empty word"),
    ],
)
def test_bad_options_write_nothing_and_say_so_in_one_line(
    extra: list[str], message: str, base: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*small(base, photo, tmp_path / "out"), *extra]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("personalize: ") and message in said
    assert not (tmp_path / "out" / "adapter.json").exists()


@pytest.mark.parametrize("options", [[], ["--calibration_weight", "0", "--attention_maps"]])
def test_maps_that_are_too_small_are_said_before_class_pictures_are_drawn(
    options: list[str], base: Path, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """A strip of 32:1: it was said when all class pictures had been drawn, which takes an hour on a large base."""
    monkeypatch.setattr("personalize.training.data.class_images.from_base", lambda *_, **__: pytest.fail("drawn"))
    Image.open(photo).resize((1024, 32)).save(photo)
    line = [*small(base, photo, tmp_path / "out"), *WORDS, "--resolution", "128", *options]
    assert main(line) == 2
    assert "the attention maps nearest 16×16 have 2 cells a side, at least 4 are needed" in capsys.readouterr().err


def test_a_custom_diffusion_command_line_is_understood() -> None:
    subjects = read_subjects((), "<new1>+<new2>", "photo of a <new1> cat and <new2> dog.")
    assert subjects == (Subject("<new1>", "cat"), Subject("<new2>", "dog"))
    for prompt in ("a (<new1> cat; <new2> dog!)", "<new1> cat: <new2>  dog?"):  # the marks were part of the class
        assert read_subjects((), "<new1>+<new2>", prompt) == subjects
    with pytest.raises(UserError, match="must say <new1> once"):
        read_subjects((), "<new1>", "a <new1> cat on <new1>")
    with pytest.raises(UserError, match="must say <new2> once"):
        read_subjects((), "<new1>+<new2>", "photo of a <new1> cat")


def test_regularisation_is_drawn_once_for_the_same_wishes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("sd1")
    wishes = {"size": (64, 64), "steps": 2, "cache": tmp_path}
    drawn = from_base(model, "a cat", 2, **wishes)
    assert [example.caption for example in drawn] == ["a cat"] * 2 and drawn[0].open().size == (64, 64)
    monkeypatch.setattr("personalize.training.data.class_images._draw", lambda *_: pytest.fail("drawn again"))
    assert from_base(model, "a cat", 2, **wishes) == drawn
    assert len(list(tmp_path.glob(f"*/{METADATA}"))) == 1


def test_regularisation_from_a_folder_and_from_a_data_set(photo: Path) -> None:
    (photo.parent / "photo.txt").write_text("a gradient")
    assert [example.caption for example in from_folder(photo.parent, "a cat")] == ["a cat", "a cat", "a gradient"]
    with pytest.raises(UserError, match="data set|class_dataset_name"):
        from_dataset("no/such-set", "a cat", 2, image_column="image", caption_column="text")


def test_every_preset_holds_known_options_that_differ_from_the_defaults() -> None:
    presets = sorted((ROOT / "configs").glob("*/multi_concept.yaml"))
    assert {path.parent.name for path in presets} == {"embedded", "sd15", "sd21", "sdxl", "low_memory"}
    known = {field.name: field.default for field in fields(SCRIPT.Config)}
    for path in presets:
        for name, value in (yaml.safe_load(path.read_text()) or {}).items():
            assert known[name] != value, f"{path}: {name} is the default"


def test_importing_the_script_is_light() -> None:
    text = (ROOT / "train" / "multi_concept.py").read_text()
    head = text[: text.index("@dataclass")].split("if TYPE_CHECKING")[0]
    light = r"errors|training\.(config|run_options)"
    heavy = rf"import (torch|diffusers|transformers|peft|accelerate)|from personalize\.(?!{light})"
    assert not re.search(heavy, head)
