"""What trainers share: what is missing is said before anything is loaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import LoggerType
from PIL import Image

from personalize.cli.launch import load_script
from personalize.cli.main import main
from personalize.errors import UserError
from personalize.models.stable_diffusion import StableDiffusion
from personalize.training import checks, distributed, trainer
from personalize.training.data import class_images
from personalize.training.run_options import RunOptions
from personalize.training.trainer import check_tracker, make_accelerator
from tests.support.children import in_child
from tests.support.tiny import tiny_folder


def test_trackers_are_asked_for_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trainer, "find_spec", lambda name: None)
    monkeypatch.setattr(StableDiffusion, "load", lambda *_, **__: pytest.fail("a base was loaded"))
    picture = Path(__file__).parents[2] / "examples" / "quickstart.png"
    line = ["train", "single_image", str(picture), "--caption", "a", "--output_dir", str(tmp_path / "out")]
    assert main([*line, "--report_to", "tensorboard"]) == 2
    said = "personalize: --report_to tensorboard needs the package tensorboard: pip install tensorboard\n"
    assert capsys.readouterr().err == said and not (tmp_path / "out").exists()


SINGLE = [
    "train",
    "single_image",
    "PHOTO",
    "--caption",
    "a cat",
    "--with_prior_preservation",
    "--class_prompt",
    "a cat",
]
TWO = ["train", "multi_concept", "PHOTO", "--concepts", "<cat1> cat"]
WARMUP = "lr_warmup_steps 4 must be below the number of updates, 4"


@pytest.mark.parametrize(
    ("line", "options", "says"),
    [
        (SINGLE, ["--max_train_steps", "4", "--lr_warmup_steps", "4"], WARMUP),
        (SINGLE, ["--max_train_samples", "40", "--lr_warmup_steps", "4"], WARMUP),
        (SINGLE, ["--min_train_samples", "3", "--samples_per_picture", "3"], "3 samples in all are less than one"),
        (SINGLE, ["--use_8bit_adam"], "use_8bit_adam needs the package bitsandbytes"),
        (SINGLE, ["--load_in_4bit"], "load_in_4bit needs the package bitsandbytes"),
        (TWO, ["--max_train_steps", "4", "--lr_warmup_steps", "4"], WARMUP),
        (TWO, ["--use_8bit_adam"], "use_8bit_adam needs the package bitsandbytes"),
        (["train", "catalogue", "TABLE"], ["--use_8bit_adam"], "use_8bit_adam needs the package bitsandbytes"),
    ],
)
def test_what_the_options_tell_is_said_before_the_base_is_loaded(
    line: list[str], options: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """It was said after class pictures were drawn."""
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    monkeypatch.setattr(StableDiffusion, "load", lambda *_, **__: pytest.fail("a base was loaded"))
    table = tmp_path / "items.csv"
    table.write_text("image,caption\nx.png,a cat")
    named = {"PHOTO": str(Path(__file__).parents[2] / "examples" / "quickstart.png"), "TABLE": str(table)}
    assert main([*(named.get(word, word) for word in line), *options, "--output_dir", str(tmp_path / "out")]) == 2
    assert says in capsys.readouterr().err and not (tmp_path / "out" / "adapter.json").exists()


def test_a_graph_of_several_sizes_is_refused_before_class_pictures_are_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trainer, "check_capturable", lambda *_, **__: None)  # which needs a GPU
    monkeypatch.setattr(class_images, "from_base", lambda *_, **__: pytest.fail("class pictures were drawn"))
    for number, width in enumerate((64, 128)):
        Image.new("RGB", (width, 64), "teal").save(tmp_path / f"{number}.png")
    line = [*SINGLE[:2], str(tmp_path), *SINGLE[3:], "--cuda_graph", "--output_dir", str(tmp_path / "out")]
    assert main([*line, "--pretrained_model_name_or_path", str(tiny_folder("sd1", tmp_path / "base"))]) == 2
    assert "cuda_graph needs pictures of one shape, got 2 sizes" in capsys.readouterr().err


def test_any_tracker_will_do_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "find_spec", lambda name: name == "wandb" or None)
    check_tracker("all")
    check_tracker("wandb")
    check_tracker(None)
    with pytest.raises(UserError, match="comet_ml"):
        check_tracker("comet_ml")


def test_accelerate_knows_every_tracker() -> None:
    known = {kind.value for kind in LoggerType}
    assert set(trainer.TRACKERS) <= known
    offered = get_args(get_args(get_type_hints(RunOptions)["report_to"])[0])
    assert set(offered) == {*trainer.TRACKERS, "all"}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(("option", "precision"), [(None, "bf16"), ("no", "no"), ("bf16", "bf16")])
def test_the_launchers_precision_counts_unless_the_option_is_given(
    option: str | None, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`mixed_precision: bf16` of configs/accelerate had no effect: the launch line of the README ran in fp32."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # what `accelerate launch` makes of it

    def started() -> list[str]:
        AcceleratorState._reset_state(reset_partial_state=True)
        script = load_script(Path(__file__).parents[2] / "train" / "single_image.py")
        given = {} if option is None else {"mixed_precision": option}
        config = script.Config(output_dir=tmp_path, **given)
        accelerator = make_accelerator(config)
        return [accelerator.mixed_precision, str(trainer.load_base(config, accelerator).dtype)]

    dtype = "torch.bfloat16" if precision == "bf16" else "torch.float32"
    assert in_child(started)[0] == [precision, dtype]


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "true", "accelerate launch is set to DeepSpeed, which divides a model"),
        ("ACCELERATE_USE_FSDP", "true", "accelerate launch is set to FSDP, which divides a model"),
        ("ACCELERATE_MIXED_PRECISION", "fp8", "--mixed_precision fp8 does not work here: "),
    ],
)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_what_the_launcher_is_set_to_and_does_not_work_is_one_line(
    variable: str, value: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FSDP and DeepSpeed were faults in the midst of it, and of fp8 it was said that None does not work."""
    monkeypatch.setenv(variable, value)

    def refused() -> list[str]:
        AcceleratorState._reset_state(reset_partial_state=True)
        script = load_script(Path(__file__).parents[2] / "train" / "single_image.py")
        said = []
        for start in (lambda: make_accelerator(script.Config(output_dir=tmp_path)), distributed.join_process_group):
            try:
                start()
            except UserError as error:
                said.append(str(error))
        return said

    single, *catalogue = in_child(refused)[0]
    assert single.startswith(says) and all(said == single for said in catalogue)
    assert len(catalogue) == (value == "true")  # a catalogue makes its Accelerators later


@pytest.mark.skipif(torch.cuda.is_available() or not hasattr(os, "fork"), reason="needs a machine without fp16")
def test_a_precision_the_device_has_not_is_one_line(tmp_path: Path) -> None:
    def refused() -> str:
        AcceleratorState._reset_state(reset_partial_state=True)
        script = load_script(Path(__file__).parents[2] / "train" / "single_image.py")
        with pytest.raises(UserError) as caught:
            make_accelerator(script.Config(mixed_precision="fp16", output_dir=tmp_path))
        return str(caught.value)

    message, _ = in_child(refused)  # Accelerate keeps one precision to a process
    assert message == "--mixed_precision fp16 does not work on this cpu: use bf16 or no"
