"""Options of train/single_image.py: lines pasted from other scripts, files, presets, and which of them counts."""

from pathlib import Path

import pytest

from personalize.cli.launch import load_script
from personalize.cli.parser import parse
from personalize.errors import UserError
from personalize.training.data.samples import SampleShard

ROOT = Path(__file__).parents[2]
SCRIPT = load_script(ROOT / "train" / "single_image.py")


def test_a_dreambooth_command_line_pastes() -> None:
    line = """--instance_data_dir dogs --instance_prompt dog --output_dir out --rank 4 --learning_rate=1e-4 --seed=0
        --with_prior_preservation --class_data_dir c --class_prompt dogs --num_class_images=7 --prior_loss_weight 0.5
        --train_text_encoder --use_8bit_adam --gradient_checkpointing --mixed_precision fp16 --resolution 512
        --train_batch_size=1 --gradient_accumulation_steps=2 --max_train_steps=9 --max_grad_norm 1.0 --snr_gamma 5
        --checkpointing_steps 3 --checkpoints_total_limit=2 --resume_from_checkpoint latest --report_to wandb
        --validation_prompt cat --num_validation_images 2 --push_to_hub --hub_model_id me/dog"""
    config = parse(SCRIPT.Config, line.split(), prog="single_image")
    assert (config.caption, config.rank, config.prior_loss_weight) == ("dog", 4, 0.5)
    assert SCRIPT.training_config(config).max_train_samples == 9 * 1 * 2, "as there: batch × accumulation × processes"
    assert SCRIPT.training_config(config, 4).max_train_samples == 9 * 1 * 2 * 4
    assert SCRIPT.class_prompt(config) == "dogs"


@pytest.mark.parametrize("preset", [None, "sd15", "embedded", "dreambooth"])
def test_batch_and_accumulation_of_a_pasted_line_make_its_update(preset: str | None) -> None:
    """The line was refused (its 4 × 2 are not the 10 samples of our own update), also beside a preset that has 4."""
    line = "dogs --train_batch_size=4 --gradient_accumulation_steps 2".split()
    files = ["--config", str(ROOT / "configs" / preset / "single_image.yaml")] if preset else []
    config = parse(SCRIPT.Config, [*line, *files], prog="single_image")
    assert [SampleShard.of(config, 0, processes).samples for processes in (1, 2)] == [8, 16]
    shard = SampleShard.of(config, 1, 2)
    assert str(shard) == "An update: 16 samples, at most 4 at a time in 2 batches on each of 2 processes"
    both = parse(SCRIPT.Config, [*line, *files, "--samples_per_update", "8"], prog="single_image")
    assert SampleShard.of(both).samples == 8
    with pytest.raises(UserError, match="16 samples, but samples_per_update is 8"):
        SampleShard.of(both, 0, 2)


def test_accumulation_in_a_file_takes_the_place_of_a_presets_update(tmp_path: Path) -> None:
    """On the command line it did; in a file of one's own the samples_per_update of the preset before it was kept."""
    (tmp_path / "own.yaml").write_text("train_batch_size: 4\ngradient_accumulation_steps: 2\n")
    files = ["--config", str(ROOT / "configs/embedded/single_image.yaml"), "--config", str(tmp_path / "own.yaml")]
    config = parse(SCRIPT.Config, ["dogs", *files], prog="single_image")
    assert config.samples_per_update is None and SampleShard.of(config).samples == 8


def test_an_option_takes_the_place_of_what_a_file_says_in_another(tmp_path: Path) -> None:
    """A number of samples on the command line gave way to the updates of a file, a data set to its folder."""
    (tmp_path / "own.yaml").write_text("max_train_steps: 7\nclass_data_dir: cats\n")
    line = ["dogs", "--config", str(tmp_path / "own.yaml")]
    given = ["--max_train_samples", "60", "--class_dataset_name", "owner/cats"]
    config = parse(SCRIPT.Config, [*line, *given], prog="single_image")
    assert SCRIPT.training_config(config).max_train_samples == 60
    assert (config.class_data_dir, config.class_dataset_name) == (None, "owner/cats")
    (tmp_path / "words.yaml").write_text("caption: a dog\n")
    told = ["--config", str(tmp_path / "words.yaml"), "--caption_model", "owner/blip"]
    captioned = parse(SCRIPT.Config, [*line, *told], prog="single_image")
    assert (captioned.caption, captioned.caption_model) == (None, "owner/blip")
    plain = parse(SCRIPT.Config, [*line, "--samples_per_update", "4"], prog="single_image")
    assert SCRIPT.training_config(plain).max_train_samples == 28 and plain.class_data_dir == Path("cats")
    steps = parse(SCRIPT.Config, [*line, "--max_train_steps", "3"], prog="single_image")
    assert SCRIPT.training_config(steps).max_train_samples == 30
