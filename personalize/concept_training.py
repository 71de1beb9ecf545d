"""What the trainer of several concepts does around a run: reading its picture, its regularisation, progress, maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from accelerate import Accelerator
from PIL import Image

from personalize import checkpoints
from personalize.concept_data import ConceptPicture, Example
from personalize.concept_learning import ConceptLearning
from personalize.concept_maps import ConceptMaps, concept_maps, map_sheet
from personalize.concepts import TOKEN, Subject
from personalize.data import find_picture
from personalize.errors import UserError
from personalize.images import load_image, to_pixels
from personalize.model import StableDiffusion
from personalize.regularisation import from_base, from_dataset, from_folder


def read_picture(config: Any) -> ConceptPicture:
    """The picture, its subjects and masks that the trainer's options name.

    Raises:
        UserError: no picture or two, no concept, masks that do not fit.
    """
    given = [path for path in (config.picture, config.instance_data_dir) if path is not None]
    if len(given) != 1:
        raise UserError(f"name one picture, e.g. `multi_concept photo.jpg`; got {len(given)}")
    subjects = read_subjects(config.concepts, config.modifier_token, config.instance_prompt, config.num_vectors)
    masks = tuple(load_image(path) for path in config.masks)
    return ConceptPicture(load_image(find_picture(given[0])), subjects, config.instance_prompt or "", masks)


def read_subjects(
    concepts: Sequence[str], modifier_token: str | None, prompt: str | None, vectors: int = 1
) -> tuple[Subject, ...]:
    """Subjects from phrases like "<cat1> cat", or from "<cat1>+<dog1>" and the words behind them in `prompt`."""
    if concepts and modifier_token:
        raise UserError("give either concepts or modifier_token, not both")
    if modifier_token is None:
        return tuple(Subject.of(phrase, vectors) for phrase in concepts)
    words = (prompt or "").split()
    found = []
    for token in modifier_token.split("+"):
        behind = [after for word, after in zip(words, words[1:], strict=False) if word == token]
        if len(behind) != 1 or TOKEN.fullmatch(behind[0]):
            raise UserError(f"instance_prompt {prompt!r} must say {token} once, and behind it what it is: {token} cat")
        found.append(Subject(token, behind[0].strip(",."), vectors))
    return tuple(found)


def examples(config: Any, model: StableDiffusion, picture: ConceptPicture, accelerator: Accelerator) -> list[Example]:
    """The regularisation pictures that the options ask for, from the first source that is named."""
    if not config.with_prior_preservation:
        return []
    prompt, count = config.class_prompt or picture.class_prompt, config.num_class_images
    if count < 1:
        raise UserError(f"num_class_images must be above 0, got {count}; or use --no_with_prior_preservation")
    if config.class_data_dir is not None:
        return from_folder(config.class_data_dir, prompt, count)
    if config.class_dataset_name is not None:
        columns = {"image_column": config.image_column, "caption_column": config.caption_column}
        return from_dataset(config.class_dataset_name, prompt, count, **columns)
    multiple = 8 * model.factor
    side = max(multiple, (config.resolution or model.resolution) // multiple * multiple)
    accelerator.print(f"Regularisation: {count} pictures of “{prompt}”, drawn by the base once")
    with accelerator.main_process_first():
        return from_base(
            model, prompt, count, side=side, steps=config.class_image_steps, seed=config.seed,
            cache=config.class_image_cache,
        )  # fmt: skip


def accelerated(config: Any) -> Accelerator:
    return Accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_with=config.report_to,
        project_dir=str(config.output_dir / config.logging_dir),
    )


def train(config: Any, run: ConceptLearning) -> None:
    """Make the updates, with progress, tracking and checkpoints."""
    from rich.progress import Progress

    accelerator, checkpoint = run.accelerator, checkpoints.find(config.output_dir, config.resume_from_checkpoint)
    if checkpoint is not None:
        run.resume(checkpoint)
    if config.resume_from_checkpoint is not None:
        start = f"checkpoint-{run.update}" if checkpoint else "the beginning: no whole checkpoint was found"
        accelerator.print(f"Going on from {start}")
    if config.report_to is not None:
        accelerator.init_trackers("multi_concept", {name: str(value) for name, value in vars(config).items()})
    with Progress(disable=not accelerator.is_local_main_process) as progress:
        task = progress.add_task("Learning", total=run.updates, completed=run.update)
        for report in run.steps():
            losses = {name: float(value) for name, value in report.losses.items()}
            progress.update(task, completed=report.update, description=f"Learning, loss {losses['loss']:.3f}")
            accelerator.log(losses | {"learning_rate": report.learning_rates[0]}, step=report.update)
            if config.checkpointing_steps and report.update % config.checkpointing_steps == 0:
                run.save_checkpoint(config.output_dir, config.checkpoints_total_limit)


class Stages:
    """The attention maps of a run at several moments, if they are wanted, as one picture for the card."""

    def __init__(self, run: ConceptLearning, picture: ConceptPicture, *, wanted: bool) -> None:
        self.run, self.wanted = run, wanted
        self.image: Image.Image = picture.image.resize(run.size, Image.Resampling.LANCZOS)
        self.subjects, self.maps = picture.subjects, dict[str, ConceptMaps]()

    def look(self, name: str) -> None:
        """Read the maps as they are now, under `name`."""
        if self.wanted and self.run.accelerator.is_main_process:
            pixels = to_pixels(self.image)
            self.maps[name] = concept_maps(self.run.model, pixels, self.run.caption, self.subjects)

    def pictures(self) -> dict[str, Image.Image]:
        """ "source", and "attention" if it was wanted."""
        sheet = {"attention": map_sheet(self.image, self.subjects, self.maps)} if self.maps else {}
        return {"source": self.image, **sheet}
