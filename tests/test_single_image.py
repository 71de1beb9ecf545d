"""train/single_image.py on a tiny base: from a picture file to a verified adapter folder."""

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from PIL import Image

from personalize.adapter import Adapter
from personalize.cli import main
from personalize.errors import UserError
from personalize.launching import load_script
from tests.tiny import tiny_folder

ROOT = Path(__file__).parents[1]
SCRIPT = load_script(ROOT / "train" / "single_image.py")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder("sd1", tmp_path_factory.mktemp("base"))


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    picture = Image.linear_gradient("L").resize((90, 60)).convert("RGBA")
    picture.save(tmp_path / "photo.png")
    (tmp_path / "photo.txt").write_text("a photo of a cat")
    return tmp_path / "photo.png"


def small(base: Path, photo: Path, output: Path) -> list[str]:
    options = {"pretrained_model_name_or_path": base, "output_dir": output, "rank": 2, "targets": "attention",
               "max_train_steps": 2, "train_batch_size": 1, "preview_steps": 2, "checkpointing_steps": 1}  # fmt: skip
    return ["train", "single_image", str(photo), *(f"--{name}={value}" for name, value in options.items())]


def test_command_line_trains_saves_and_resumes(
    base: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = small(base, photo, tmp_path / "out")
    assert main([*line, "--report_to", "tensorboard", "--person"]) == 0
    said = capsys.readouterr().out
    assert "caption “a photo of a cat”" in said and "reconstruction_db" in said
    adapter = Adapter.load(tmp_path / "out")
    assert adapter.rank == 2 and adapter.info["updates"] == 2 and adapter.info["person"] is True
    assert adapter.info["size"] == [64, 96] and {"autoencoder_db", "standalone_gap_db"} <= set(adapter.info)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"checkpoint-1", "checkpoint-2", "logs", "source.png", "reconstruction.png", "README.md"} <= names
    again = (tmp_path / "out" / "pytorch_lora_weights.safetensors").read_bytes()
    assert main([*line, "--resume_from_checkpoint", "checkpoint-1"]) == 0
    assert "Going on from checkpoint-1" in capsys.readouterr().out
    assert (tmp_path / "out" / "pytorch_lora_weights.safetensors").read_bytes() == again


def test_standalone(base: Path, photo: Path, tmp_path: Path) -> None:
    assert main([*small(base, photo, tmp_path / "out"), "--standalone"]) == 0
    adapter = Adapter.load(tmp_path / "out")
    assert adapter.source is None and "standalone_gap_db" not in adapter.info


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--caption", " "], "caption from --caption is empty"),
        (["--rank", "0"], "rank must be above 0"),
        (["--max_train_samples=3", "--train_batch_size=4", "--max_train_steps=None"], "one update of 4 samples"),
        (["--instance_data_dir", "."], "name one picture"),
        (["--resume_from_checkpoint", "nowhere"], "no checkpoint at"),
        (["--learning_rte", "1"], "did you mean --learning_rate"),
    ],
)
def test_bad_options_write_nothing_and_say_so_in_one_line(
    extra: list[str], message: str, base: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*small(base, photo, tmp_path / "out"), *extra]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("personalize: ") and message in said
    assert not (tmp_path / "out" / "adapter.json").exists()


def test_no_picture_is_an_error() -> None:
    with pytest.raises(UserError, match="name one picture"):
        SCRIPT.main(SCRIPT.Config())


def test_every_preset_holds_known_options_that_differ_from_the_defaults() -> None:
    presets = sorted((ROOT / "configs").glob("*/single_image.yaml"))
    assert {path.parent.name for path in presets} == {"embedded", "sd15", "sd21", "sdxl"}
    known = {field.name: field.default for field in fields(SCRIPT.Config)}
    for path in presets:
        for name, value in (yaml.safe_load(path.read_text()) or {}).items():
            assert known[name] != value, f"{path}: {name} is the default"


def test_accelerate_presets_say_their_number() -> None:
    for count in (1, 2, 4, 8):
        text = (ROOT / "configs" / "accelerate" / f"{count}_gpu.yaml").read_text()
        assert int(re.search(r"num_processes: (\d+)", text)[1]) == count  # type: ignore[index]
        assert json.dumps(yaml.safe_load(text))


def test_importing_the_script_is_light() -> None:
    text = (ROOT / "train" / "single_image.py").read_text()
    head = text[: text.index("@dataclass")].split("if TYPE_CHECKING")[0]
    heavy = r"import (torch|diffusers|transformers|peft|accelerate)|from personalize\.(?!errors|recipes)"
    assert not re.search(heavy, head)
