"""Learn a subject from one picture, or from a few: LoRA and source embedding together (Forgedit, arXiv 2309.10556).

    accelerate launch train/single_image.py photo.jpg --caption "a photo of a dog" --output_dir my-dog
    personalize train single_image photo.jpg --config sd15 --pretrained_model_name_or_path FOLDER --output_dir my-dog

Writes an adapter folder: LoRA files for diffusers and for the graphical programs, the source embedding, a card.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from personalize.errors import UserError
from personalize.training.config import SingleImageConfig, extract_config
from personalize.training.run_options import ONE_CLASS_SOURCE, PriorPreservationOptions, RunOptions

if TYPE_CHECKING:
    from accelerate import Accelerator

    from personalize.models.stable_diffusion import StableDiffusion
    from personalize.training.data.buckets import FittedImage
    from personalize.training.data.images import TrainingImage
    from personalize.training.single_image import SingleImageRun
    from personalize.training.trainer import Watcher


@dataclass(frozen=True, kw_only=True)
class Config(SingleImageConfig, PriorPreservationOptions, RunOptions):
    picture: tyro.conf.Positional[tuple[Path, ...]] = ()
    """The picture to learn, of any size, aspect ratio and format; or several, or a folder of them."""
    instance_image: Path | None = None
    """The picture, as an option."""
    instance_data_dir: Path | None = None
    """A folder of pictures, with captions in metadata.jsonl, .csv or .parquet, or in .txt or .caption files."""
    dataset_name: str | None = None
    """A data set of pictures: a hub id or a local folder."""
    instance_mask: Path | None = None
    """A picture of the same size, white where the subject is, black or transparent elsewhere: there the loss counts
    less.  For several pictures a folder with a mask of each one's name."""
    caption: str | None = None
    """What the picture shows; of several, those without a caption of their own.  If not given, read from .txt files."""
    caption_model: str | None = None
    """BLIP-family folder or hub id that captions pictures without a caption."""
    resolution: int | None = None
    """Pictures are fitted to about resolution² pixels, aspect ratio kept; the base's own if not given."""
    max_train_steps: int | None = None
    """Updates to make; overrides the numbers of samples."""

    replaces = SingleImageConfig.replaces | ONE_CLASS_SOURCE | {
        "max_train_samples": "max_train_steps", "caption": "caption_model", "caption_model": "caption",
    }  # fmt: skip

    def check(self) -> None:
        from personalize.training.checks import check_single_image

        check_single_image(self)


def main(config: Config, watch: Watcher | None = None) -> Path:
    """Train and save the adapter; returns its folder.  `watch` sees each update, and may end the training there."""
    from personalize.training.trainer import output_folder

    with output_folder(config.output_dir):
        return _train(config, watch)


def _train(config: Config, watch: Watcher | None) -> Path:
    from personalize.io.images import to_image
    from personalize.training import trainer
    from personalize.training.best_weights import find_judge
    from personalize.training.data.buckets import fit
    from personalize.training.data.class_images import class_images
    from personalize.training.data.images import read_training_images
    from personalize.training.data.samples import SampleShard
    from personalize.training.single_image import check_sizes, idle_parts, planned_updates, single_image_run
    from personalize.training.validation import save_with_preview

    images = read_training_images(config)
    accelerator = trainer.make_accelerator(config)
    settings = training_config(config, accelerator.num_processes)
    planned_updates(settings, len(images), SampleShard.of(settings, processes=accelerator.num_processes))
    model = trainer.load_base(config, accelerator)
    tokens = learned_tokens(config, model, [image.caption for image in images])
    with model.offload.idle(idle_parts(model, settings), sparing=settings.offload):
        resolution = config.resolution or model.resolution
        pictures = [fit(image.image, image.mask, resolution, 8 * model.factor) for image in images]
        check_sizes(settings, pictures)  # before class pictures are drawn, which takes long
        captions = [image.caption for image in images]
        judged = zip(pictures, captions, strict=True) if config.keep_best else ()
        judge = find_judge(config, model, [(to_image(one.pixels), caption) for one, caption in judged], tokens)
        classes = class_images(config, model, class_prompt(config), pictures[0].size, accelerator)
        with single_image_run(
            model, pictures, captions, settings, class_images=classes, accelerator=accelerator
        ) as run:
            describe(run, images, pictures, accelerator)
            trainer.train(config, run, "single_image", watch, judge)
            adapter = run.kept_adapter(person=config.person)
        if accelerator.is_main_process:
            figures = save_with_preview(
                model, adapter, pictures[0], config.output_dir, steps=config.preview_steps, seed=config.seed
            )
            print(*(f"{name}: {value}" for name, value in figures.items()), sep="\n")
        return trainer.finish(config, accelerator)


def training_config(config: Config, processes: int = 1) -> SingleImageConfig:
    """The training configuration among the options; `max_train_steps` becomes a number of samples."""
    if config.max_train_steps is None:
        return extract_config(config, SingleImageConfig)
    samples = config.max_train_steps * config.update_samples(processes)
    return extract_config(config, SingleImageConfig, max_train_samples=samples)


def class_prompt(config: Config) -> str:
    """The prompt of the class pictures; UserError if they are asked for without one."""
    if config.with_prior_preservation and not (config.class_prompt or "").strip():
        raise UserError("with_prior_preservation needs class_prompt: what class pictures show, e.g. 'a photo of a dog'")
    return config.class_prompt or ""


def learned_tokens(config: Config, model: StableDiffusion, captions: Sequence[str]) -> list[str]:
    """The token that is to be learned, if there is one; UserError unless it is new to the base, and in the captions."""
    from personalize.adapters.subjects import read_trigger
    from personalize.adapters.textual_inversion import check_new_tokens

    tokens = [] if config.instance_token is None else [read_trigger(config.instance_token, captions).token]
    check_new_tokens(model, tokens)
    return tokens


def describe(
    run: SingleImageRun, images: Sequence[TrainingImage], pictures: Sequence[FittedImage], accelerator: Accelerator
) -> None:
    """Print the pictures, their sizes and what is cut, and how the base tokenizes their captions."""
    sizes = dict.fromkeys(f"{picture.size[1]}×{picture.size[0]}" for picture in pictures)
    accelerator.print(f"{len(images)} picture{'s' * (len(images) > 1)} at {', '.join(sizes)} px")
    for image, picture in zip(images, pictures, strict=True):
        notes = [f"{picture.size[1]}×{picture.size[0]} px", picture.cut, picture.padding, "masked" * bool(image.mask)]
        tokens = " · ".join(run.model.tokens(image.caption))
        accelerator.print(f"{image.name}: {', '.join(filter(None, notes))}: caption “{image.caption}” = {tokens}")


if __name__ == "__main__":
    from personalize.cli.main import run_script

    raise SystemExit(run_script(Config, main))
