"""train/single_image.py on a tiny base: from a picture file to a verified adapter folder."""

import json
import re
import warnings
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path

import huggingface_hub
import pytest
import yaml
from PIL import Image

from personalize.adapters.adapter import Adapter
from personalize.cli.launch import load_script
from personalize.cli.main import main
from personalize.cli.parser import parse
from personalize.errors import Notice, UserError
from personalize.training.data.images import read_training_images
from tests.support.hub import Hub
from tests.support.tiny import tiny_folder

ROOT = Path(__file__).parents[2]
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
               "max_train_steps": 2, "samples_per_update": 1, "preview_steps": 2, "checkpointing_steps": 1}  # fmt: skip
    return ["train", "single_image", str(photo), *(f"--{name}={value}" for name, value in options.items())]


def test_the_command_line_learns_a_token_that_edits_know(
    base: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The caption beside the picture must say it, before anything is loaded; the card and the files have it."""
    line = [*small(base, photo, tmp_path / "out"), "--instance_token", "<rex>"]
    assert main(line) == 2 and "does not say <rex>" in capsys.readouterr().err
    assert main([*line, "--caption", "a photo of a <rat> cat"]) == 2 and not (tmp_path / "out").exists()
    photo.with_suffix(".txt").write_text("a photo of a <rex> cat")
    assert main(line) == 0
    assert set(Adapter.load(tmp_path / "out").concepts) == {"<rex>"}
    assert "a · <rex> · cat" in capsys.readouterr().out
    edit = ["edit", str(tmp_path / "out"), "--pretrained_model_name_or_path", str(base), "--num_inference_steps", "1"]
    assert main([*edit, "--output_dir", str(tmp_path / "a"), "--prompt", "a <rex> cat on a beach"]) == 0
    assert main([*edit, "--output_dir", str(tmp_path / "b"), "--prompt", "a <rat> cat on a beach"]) == 2
    assert "it has <rex>" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "out")]) == 0 and "<rex>" in capsys.readouterr().out


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


@pytest.mark.slow  # each by itself is tried elsewhere
def test_everything_at_once(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two pictures, one of them masked, class pictures, text encoders, 4 and 8 bits, validation, and the hub."""
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(Hub, "calls", [])
    folder, out = tmp_path / "subject", tmp_path / "out"
    folder.mkdir()
    for name in ("a", "b", "m"):
        Image.linear_gradient("L").resize((64, 64)).save(folder / f"{name}.png")
    rows = [{"file_name": "a.png", "text": "a photo of a cat"}, {"file_name": "b.png", "text": "a cat on the beach"}]
    rows = [{**rows[0], "mask_file_name": "m.png"}, {**rows[1], "mask_file_name": None}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    line = small(base, folder, out)
    line += ["--train_text_encoder", "--load_in_4bit", "--use_8bit_adam", "--gradient_checkpointing", "--push_to_hub"]
    line += ["--with_prior_preservation", "--class_prompt", "a photo of a dog", "--num_class_images", "2"]
    line += ["--class_image_steps", "1", "--class_image_cache", str(tmp_path / "drawn"), "--network_dim", "3"]
    line += ["--validation_prompt", "a cat in snow", "--validation_steps", "2", "--num_validation_images", "1"]
    assert main([part for part in line if not part.startswith("--rank")]) == 0
    said = capsys.readouterr().out
    for words in ("2 pictures at 64×64 px", "px, masked: caption “a photo of a cat” = a · photo",
                  "4 bits: the UNet takes 4 MB", "Memory, about",
                  "Class pictures: 2 of “a photo of a dog”", "Uploaded: https://hub"):  # fmt: skip
        assert words in said, said
    adapter = Adapter.load(out)
    assert adapter.rank == 3 and adapter.info["pictures"] == 2 and adapter.info["regularisation"] == 2
    assert adapter.info["captions"] == [row["text"] for row in rows] and adapter.source is not None
    assert any(key.startswith("text_encoder.") for key in adapter.lora)
    assert [path.name for path in (out / "validation").iterdir()] == ["000002-0.png"]
    assert Hub.calls[0]["repo_id"] == "out" and "validation" not in " ".join(Hub.calls[1]["allow_patterns"])
    assert "2 pictures, learned by" in (out / "README.md").read_text(encoding="utf-8")


def test_standalone(base: Path, photo: Path, tmp_path: Path) -> None:
    assert main([*small(base, photo, tmp_path / "out"), "--standalone"]) == 0
    adapter = Adapter.load(tmp_path / "out")
    assert adapter.source is None and "standalone_gap_db" not in adapter.info


@pytest.fixture
def dogs(tmp_path: Path) -> Path:
    """Two captioned pictures, and a folder of their masks inside their own."""
    (tmp_path / "dogs" / "masks").mkdir(parents=True)
    for number, side in enumerate((64, 96)):
        Image.new("RGB", (side, 64), "teal").save(tmp_path / "dogs" / f"{number}.png")
        (tmp_path / "dogs" / f"{number}.txt").write_text(f"a photo of a <rex> dog {number}")
        Image.linear_gradient("L").resize((side, 64)).save(tmp_path / "dogs" / "masks" / f"{number}.png")
    return tmp_path / "dogs"


def test_an_embedding_rate_without_an_embedding_is_a_notice(photo: Path) -> None:
    """A preset may give the rate."""
    line = [str(photo), "--standalone", "--text_embedding_lr", "1e-2"]
    for option in ("standalone", "train_text_encoder"):
        with pytest.warns(Notice, match=f"{option} trains no embedding, so that nothing comes of text_embedding_lr"):
            parse(SCRIPT.Config, [str(photo), f"--{option}", *line[2:]], prog="x").check()
    photo.with_suffix(".txt").write_text("a photo of a <rex> cat")
    with warnings.catch_warnings():
        warnings.simplefilter("error", Notice)
        parse(SCRIPT.Config, [*line, "--instance_token", "<rex>"], prog="x").check()
        parse(SCRIPT.Config, line[:2], prog="x").check()


@pytest.mark.parametrize("spelled", ["same", "another way"])
@pytest.mark.parametrize("caption", [(), ("--caption", "a <rex> dog")])
def test_masks_in_a_folder_among_the_pictures_are_not_learned(
    spelled: str, caption: tuple[str, ...], dogs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They were refused as pictures without a caption."""
    masks = dogs / "masks" if spelled == "same" else dogs.parent / "dogs" / ".." / "dogs" / "masks"
    config = parse(SCRIPT.Config, ["--instance_data_dir", str(dogs), "--instance_mask", str(masks), *caption], prog="x")
    config.check()
    assert f"2 pictures in {dogs}" in capsys.readouterr().out
    assert [image.mask is not None for image in read_training_images(config)] == [True, True]


def test_a_weight_of_masks_without_a_mask_is_a_notice(dogs: Path) -> None:
    """multi_concept refuses it, and nothing said so of one picture."""
    line = ["--instance_data_dir", str(dogs), "--mask_weight", "0.5", "--caption", "a dog"]
    with pytest.warns(Notice, match="no picture has a mask, so that nothing comes of --mask_weight"):
        parse(SCRIPT.Config, line, prog="x").check()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "no picture has a mask", Notice)
        parse(SCRIPT.Config, [*line, "--instance_mask", str(dogs / "masks")], prog="x").check()


def test_a_captioning_model_beside_a_caption_is_a_notice(photo: Path) -> None:
    """The model was not asked, and nothing said so."""
    words = ["--caption", "a cat", "--caption_model", "owner/blip"]
    with pytest.warns(Notice, match="nothing comes of --caption_model"):
        parse(SCRIPT.Config, [str(photo), *words], prog="x").check()


def test_a_trigger_must_be_in_the_captions_that_are_learned(dogs: Path) -> None:
    """Of several files each has its own, and --caption is for the others; a single file has --caption."""
    files, trigger = [str(dogs / "0.png"), str(dogs / "1.png")], ["--instance_token", "<rex>"]
    for pictures, caption, right in (
        (files, "a dog", True),
        (files[:1], "a dog", False),
        (files[:1], "a <rex> dog", True),
    ):
        config = parse(SCRIPT.Config, [*pictures, "--caption", caption, *trigger], prog="x")
        with nullcontext() if right else pytest.raises(UserError, match="does not say <rex>"):
            config.check()
    (dogs / "1.txt").write_text("a photo of a dog")
    with pytest.raises(UserError, match="does not say <rex>"):
        parse(SCRIPT.Config, [*files, "--caption", "a <rex> dog", *trigger], prog="x").check()
    (dogs / "1.txt").unlink()
    parse(SCRIPT.Config, [*files, "--caption", "a <rex> dog", *trigger], prog="x").check()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--caption", " "], "caption from --caption is empty"),
        (["--rank", "0"], "rank is 0: give a number from 1"),
        (["--instance_data_dir", "."], "name the pictures in one way"),
        (["--resume_from_checkpoint", "nowhere"], "no checkpoint at"),
        (["--with_prior_preservation"], "needs --class_prompt"),
        (["--instance_mask", "nowhere.png"], "nowhere.png: no such file"),
        (["--mask_weight", "2"], "mask_weight is a fraction from 0 to 1"),
        (["--validation_prompt", "a cat", "--num_validation_images", "0"], "num_validation_images is 0: give a number"),
        (["--text_encoder_lr", "1e-5"], "text_encoder_lr needs --train_text_encoder"),
        (
            ["--with_prior_preservation", "--class_prompt=x", "--class_data_dir=.", "--class_dataset_name=o/x"],
            "class pictures come from one place, got --class_data_dir . and --class_dataset_name o/x",
        ),
        (["--class_image_steps", "0"], "class_image_steps is 0: give a number from 1"),
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
    with pytest.raises(UserError, match="name the pictures in one way"):
        SCRIPT.main(SCRIPT.Config())


def test_every_preset_holds_known_options_that_differ_from_the_defaults() -> None:
    presets = sorted((ROOT / "configs").glob("*/single_image.yaml"))
    names = {"embedded", "sd15", "sd21", "sdxl", "low_memory", "fast", "dreambooth"}
    assert {path.parent.name for path in presets} == names
    known = {field.name: field.default for field in fields(SCRIPT.Config)}
    for path in presets:
        options = yaml.safe_load(path.read_text()) or {}
        counts = {"samples_per_update", "min_train_samples", "samples_per_picture"}
        assert not counts & options.keys() or counts <= options.keys(), f"{path}: one count without the other"
        for name, value in options.items():
            assert known[name] != value or name in counts, f"{path}: {name} is the default"


def test_accelerate_presets_say_their_number() -> None:
    for count in (1, 2, 4, 8):
        text = (ROOT / "configs" / "accelerate" / f"{count}_gpu.yaml").read_text()
        assert int(re.search(r"num_processes: (\d+)", text)[1]) == count  # type: ignore[index]
        assert json.dumps(yaml.safe_load(text))


def test_importing_the_script_is_light() -> None:
    text = (ROOT / "train" / "single_image.py").read_text()
    head = text[: text.index("@dataclass")].split("if TYPE_CHECKING")[0]
    light = r"errors|training\.(config|run_options)"
    heavy = rf"import (torch|diffusers|transformers|peft|accelerate)|from personalize\.(?!{light})"
    assert not re.search(heavy, head)
