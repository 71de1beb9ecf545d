"""Learn several concepts from one picture, each under a token of its own (DisenDiff, arXiv 2403.18551).

    accelerate launch train/multi_concept.py pets.jpg --concepts "<cat1> cat" "<dog1> dog" --output_dir my-pets
    personalize train multi_concept pets.jpg --config sd15 --pretrained_model_name_or_path FOLDER …

Writes an adapter folder: LoRA files, one textual-inversion file per concept for each kind of program, a card.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from personalize.training.config import MultiConceptConfig, extract_config
from personalize.training.run_options import ONE_CLASS_SOURCE, PriorPreservationOptions, RunOptions

if TYPE_CHECKING:
    from accelerate import Accelerator

    from personalize.training.multi_concept import MultiConceptRun
    from personalize.training.trainer import Watcher


@dataclass(frozen=True, kw_only=True)
class Config(MultiConceptConfig, PriorPreservationOptions, RunOptions):
    picture: tyro.conf.Positional[Path | None] = None
    """The picture that shows the concepts, of any shape: it is learned in its own, whole."""
    instance_data_dir: Path | None = None
    """A folder that holds the picture and no other."""
    concepts: tuple[str, ...] = ()
    """For each concept its new token and what it is: "<cat1> cat" "<cup1> coffee cup"."""
    modifier_token: str | None = None
    """The new tokens alone, as "<cat1>+<dog1>"; the word after each in --instance_prompt says what it is."""
    instance_prompt: str | None = None
    """What the picture shows, naming every concept once; "photo of a <cat1> cat and <dog1> dog" if not given."""
    num_vectors: int = 1
    """Vectors (tokens) per concept."""
    masks: tuple[Path, ...] = ()
    """A picture for each concept, white where it is, black or transparent elsewhere; draws its attention there."""
    resolution: int | None = None
    """Side of a square picture in pixels, others have as many; the base's own if not given."""
    with_prior_preservation: bool = True
    """Fill half of every batch with class pictures: from class_data_dir, class_dataset_name, or drawn by the base."""
    class_prompt: str | None = None
    """What class pictures show; the instance prompt without the new tokens if not given."""
    num_class_images: int = 200
    """How many class pictures to use, or to let the base draw."""
    attention_maps: bool = False
    """Also write a picture of each token's and class phrase's attention, before and after training."""

    replaces = MultiConceptConfig.replaces | ONE_CLASS_SOURCE

    def check(self) -> None:
        from personalize.training.checks import check_multi_concept

        check_multi_concept(self)


def main(config: Config, watch: Watcher | None = None) -> Path:
    """Train and save the adapter; returns its folder.  `watch` sees each update, and may end the training there."""
    from personalize.training.trainer import output_folder

    with output_folder(config.output_dir):
        return _train(config, watch)


def _train(config: Config, watch: Watcher | None) -> Path:
    from personalize.training import trainer
    from personalize.training.best_weights import find_judge
    from personalize.training.concept_maps import MapSnapshots
    from personalize.training.data.class_images import class_images
    from personalize.training.data.concepts import check_prompt, read_picture
    from personalize.training.multi_concept import map_sizes, multi_concept_run, reads_maps, training_size
    from personalize.training.saving import save_trained

    picture, settings = read_picture(config), extract_config(config, MultiConceptConfig)
    accelerator = trainer.make_accelerator(config)
    model = trainer.load_base(config, accelerator, full_weights=config.full_kv)
    check_prompt(model, picture)  # what cannot work is said before class pictures are drawn, which takes long
    judge = find_judge(config, model, [(picture.image, picture.prompt)], [one.token for one in picture.subjects])
    size = training_size(model, picture, config.resolution)
    if config.attention_maps or reads_maps(settings, picture):
        map_sizes(model, size)  # raises if none fit
    classes = class_images(config, model, config.class_prompt or picture.class_prompt, size, accelerator)
    with multi_concept_run(
        model, picture, settings, class_images=classes, resolution=config.resolution, accelerator=accelerator
    ) as run:
        maps = MapSnapshots(run, enabled=config.attention_maps)
        describe(run, accelerator)
        maps.record("before")
        trainer.train(config, run, "multi_concept", watch, judge)
        adapter = run.kept_adapter(person=config.person, regularisation=len(classes))
        if config.attention_maps and accelerator.is_main_process:
            save_trained(adapter, config.output_dir)  # before the maps are drawn, which could fail
        with run.kept():
            maps.record("after")
    if accelerator.is_main_process:
        save_trained(adapter, config.output_dir, pictures=maps.pictures())
        print(f"Words: {', '.join(adapter.concepts)}")
    return trainer.finish(config, accelerator)


def describe(run: MultiConceptRun, accelerator: Accelerator) -> None:
    """Print the prompt, the picture's size, and the attention maps that the loss reads."""
    notes = [f"{run.size[1]}×{run.size[0]} px", run.fitted.cut, run.fitted.padding]
    count = f"{len(run.class_images)} regularisation pictures"
    accelerator.print(f"“{run.caption}” at {', '.join(filter(None, [*notes, count]))}")
    for name, size in run.map_layers.items():
        accelerator.print(f"calibrating {size} maps of {name}")


if __name__ == "__main__":
    from personalize.cli.main import run_script

    raise SystemExit(run_script(Config, main))
