"""Learn a subject from one picture, or from a few: LoRA and source embedding together (Forgedit, arXiv 2309.10556).

    accelerate launch train/single_image.py photo.jpg --caption "a photo of a dog" --output_dir my-dog
    personalize train single_image photo.jpg --config sd15 --pretrained_model_name_or_path FOLDER --output_dir my-dog

Writes an adapter folder: LoRA files for diffusers and for the graphical programs, the source embedding, a card.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from personalize.errors import UserError
from personalize.training.config import PriorPreservationOptions, RunOptions, SingleImageConfig, extract_config

if TYPE_CHECKING:
    from accelerate import Accelerator

    from personalize.training.data.images import TrainingImage
    from personalize.training.single_image import SingleImageRun


@dataclass(frozen=True, kw_only=True)
class Config(SingleImageConfig, PriorPreservationOptions, RunOptions):
    picture: tyro.conf.Positional[Path | None] = None
    """The picture to learn, of any size, aspect ratio and format; or a folder of several."""
    instance_image: Path | None = None
    """The picture, as an option."""
    instance_data_dir: Path | None = None
    """A folder of pictures, with their captions in a metadata.jsonl or in .txt files."""
    dataset_name: str | None = None
    """A data set of pictures: a hub id or a local folder."""
    instance_mask: Path | None = None
    """A picture of the same size, white where the subject is: the loss counts less elsewhere."""
    caption: str | None = None
    """What the picture shows; of several, those without a caption of their own.  If not given, read from .txt files."""
    caption_model: str | None = None
    """BLIP-family folder or hub id that captions pictures without a caption."""
    resolution: int | None = None
    """Pictures are fitted to about resolution² pixels, aspect ratio kept; the base's own if not given."""
    max_train_steps: int | None = None
    """Updates to make; overrides max_train_samples."""


def main(config: Config) -> Path:
    """Train and save the adapter; returns its folder."""
    from personalize.adapters.adapter import check_target
    from personalize.training import trainer
    from personalize.training.data.class_images import class_images
    from personalize.training.data.images import read_training_images, to_common_size
    from personalize.training.single_image import single_image_run
    from personalize.training.validation import preview

    images = read_training_images(config)
    check_target(config.output_dir)
    accelerator = trainer.make_accelerator(config)
    settings = training_config(config)
    model = trainer.load_base(config, accelerator)
    pixels, masks = to_common_size(images, config.resolution or model.resolution, 8 * model.factor)
    size = (pixels.shape[-2], pixels.shape[-1])
    classes = class_images(config, model, class_prompt(config), size, accelerator)
    captions = [image.caption for image in images]
    with single_image_run(
        model, pixels, captions, settings, masks=masks, class_images=classes, accelerator=accelerator
    ) as run:
        describe(run, images, accelerator)
        trainer.train(config, run, "single_image")
        adapter = run.adapter(person=config.person, pictures=len(images), regularisation=len(classes))
    if accelerator.is_main_process:
        figures, pictures = preview(model, adapter, pixels[:1], steps=config.preview_steps, seed=config.seed)
        replace(adapter, info={**adapter.info, **figures}).save(config.output_dir, pictures=pictures)
        print(*(f"{name}: {value}" for name, value in figures.items()), sep="\n")
    return trainer.finish(config, accelerator)


def training_config(config: Config) -> SingleImageConfig:
    """The training configuration among the options; `max_train_steps` becomes a number of samples."""
    if config.max_train_steps is None:
        return extract_config(config, SingleImageConfig)
    samples = config.max_train_steps * config.samples_per_update
    return extract_config(config, SingleImageConfig, max_train_samples=samples)


def class_prompt(config: Config) -> str:
    """The prompt of the class pictures; UserError if they are asked for without one."""
    if config.with_prior_preservation and not config.class_prompt:
        raise UserError("with_prior_preservation needs class_prompt: what class pictures show, e.g. 'a photo of a dog'")
    return config.class_prompt or ""


def describe(run: SingleImageRun, images: Sequence[TrainingImage], accelerator: Accelerator) -> None:
    """Print the pictures, and how the base tokenizes their captions, which shows spelling mistakes."""
    height, width = run.size
    accelerator.print(f"{len(images)} picture{'s' * (len(images) > 1)} at {width}×{height} px")
    for image in images[:3]:
        masked = "" if image.mask is None else ", masked"
        tokens = " · ".join(run.model.tokens(image.caption))
        accelerator.print(f"{image.name}: caption “{image.caption}” = {tokens}{masked}")


if __name__ == "__main__":
    from personalize.cli.main import run_script

    raise SystemExit(run_script(Config, main))
