"""Class pictures for regularisation (prior preservation): from a folder, a data set, or drawn by the base itself.

Without them the class words take on the look of the one picture (language drift).  What the base draws is cached in a
folder named by a hash of all the settings that decide a picture, so that a second run reuses it.

References: Kumari et al., "Multi-Concept Customization of Text-to-Image Diffusion", arXiv 2212.04488, §3.2.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from hashlib import sha256
from itertools import chain, islice
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image

from personalize.errors import said_if_stopped
from personalize.io.atomic import write_file
from personalize.io.figures import png
from personalize.io.image_folders import read_folder
from personalize.io.images import to_image
from personalize.io.plain_files import at_home
from personalize.io.progress import ticked
from personalize.io.provenance import GENERATED
from personalize.models.stable_diffusion import StableDiffusion
from personalize.sampling.denoise import Edit, sample
from personalize.sampling.schedule import make_schedule
from personalize.training.checks import check_class_image_count
from personalize.training.data.captions import folder_caption, row_caption
from personalize.training.data.concepts import ClassImage
from personalize.training.data.images import decode_cell, load_rows

METADATA = "about.json"  # in a folder of drawn pictures, when all are there: their settings and number
CACHE = Path("~/.cache/personalize/regularisation")
GUIDANCE, BATCH = 6.0, 4  # Custom Diffusion's guidance


def class_images(
    config: Any, model: StableDiffusion, prompt: str, size: tuple[int, int], accelerator: Any
) -> list[ClassImage]:
    """The class pictures that a trainer's options (`PriorPreservationOptions`) ask for; none if they do not.

    They come from the first of class_data_dir, class_dataset_name and the base.  The processes share the drawing of
    those of the base, and one on each machine writes them, so that no common disk is needed.

    Args:
        prompt: what class pictures show.
        size: (H, W) of the pictures that the base draws.

    Raises:
        UserError: num_class_images below 1, or a source that cannot be read.
    """
    if not config.with_prior_preservation:
        return []
    count = config.num_class_images
    check_class_image_count(count)
    if config.class_data_dir is not None:
        return from_folder(config.class_data_dir, prompt, count, caption_column=config.caption_column)
    if config.class_dataset_name is not None:
        columns = {"image_column": config.image_column, "caption_column": config.caption_column}
        return from_dataset(config.class_dataset_name, prompt, count, **columns)
    accelerator.print(f"Class pictures: {count} of “{prompt}”, drawn by the base once")
    return from_base(
        model, prompt, count, size=size, steps=config.class_image_steps, seed=config.seed,
        cache=config.class_image_cache, accelerator=accelerator,
    )  # fmt: skip


def from_folder(
    folder: str | Path, class_prompt: str, count: int | None = None, *, caption_column: str = "text"
) -> list[ClassImage]:
    """The first `count` pictures in `folder` by name, with their own captions, or else with `class_prompt`.

    A caption stands in `caption_column` of the folder's metadata, or in a text file beside the picture.

    Raises:
        UserError: no folder, no picture in it, or metadata that cannot be read (see `read_folder`).
    """
    images = read_folder(folder).images[:count]
    return [ClassImage(folder_caption(image, caption_column) or class_prompt, image.path) for image in images]


def from_dataset(
    name: str, class_prompt: str, count: int, *, image_column: str, caption_column: str
) -> list[ClassImage]:
    """The first `count` pictures of a data set's training split, captioned by `caption_column` or else `class_prompt`.

    name: a hub id, or a local folder that `datasets.load_dataset` reads.

    Raises:
        UserError: the data set cannot be loaded, lacks the image column, or has captions that are no words.
    """
    rows = islice(load_rows(f"class_dataset_name {name}", image_column, path=name), count)
    return [
        ClassImage(row_caption(row, caption_column, where) or class_prompt, decode_cell(row[image_column], where))
        for row, where in ((row, f"{name}, picture {number}") for number, row in enumerate(rows, 1))
    ]


def from_base(
    model: StableDiffusion,
    class_prompt: str,
    count: int,
    *,
    size: tuple[int, int],
    steps: int = 50,
    seed: int = 0,
    cache: str | Path | None = None,
    accelerator: Any | None = None,
) -> list[ClassImage]:
    """The first `count` pictures of (H, W) = `size` that the base draws of `class_prompt`; cached ones are kept.

    They are drawn by DDIM in `steps` steps with guidance 6 and the seeds `seed`, `seed` + 1, …, in whole batches, so
    that picture number n is the same whatever their `count`.  Each batch is in the cache as soon as it is drawn: an
    interrupted run goes on after the last one.  With an `accelerator` of several processes each draws some batches.

    Raises:
        UserError: the cache cannot be written.
    """
    base = {name: value for name, value in model.about().items() if name != "name"}
    settings = {
        "base": base, "prompt": class_prompt, "size": list(size), "steps": steps, "seed": seed, "guidance": GUIDANCE,
        "precision": str(model.dtype).removeprefix("torch."),
    }  # fmt: skip
    key = sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    folder = at_home(cache or CACHE) / key
    group: Any = accelerator or PartialState()
    several = group.num_processes > 1
    missing = [first for first in range(0, count, BATCH) if not all(path.is_file() for path in _paths(folder, first))]
    missing = sorted(set(chain(*(gather_object([missing]) if several else [missing]))))
    own, drawn = missing[group.process_index :: group.num_processes], {}
    with said_if_stopped(f"stopped: class pictures drawn so far are in {folder}, the same command draws the others"):
        for first, images in _draw(model, settings, own) if own else ():
            for path, image in zip(_paths(folder, first), images, strict=True):
                drawn[path.name] = png(image, GENERATED)
                write_file(path, drawn[path.name])
    files = dict(gather_object([*drawn.items()])) if several and missing else drawn
    if group.is_local_main_process:
        for name in files.keys() - drawn.keys():  # of other processes, which may be on another machine
            write_file(folder / name, files[name])
        if missing or not (folder / METADATA).is_file():
            write_file(folder / METADATA, json.dumps(settings | {"count": count}, indent=1).encode())
    if several:
        group.wait_for_everyone()
    return [ClassImage(class_prompt, path) for first in range(0, count, BATCH) for path in _paths(folder, first)][
        :count
    ]


def _paths(folder: Path, first: int) -> list[Path]:
    """The files of the batch whose first picture has the number `first`."""
    return [folder / f"{number:04d}.png" for number in range(first, first + BATCH)]


def _draw(
    model: StableDiffusion, settings: dict[str, Any], batches: Sequence[int]
) -> Iterator[tuple[int, list[Image.Image]]]:
    """The number of the first picture of each of these `batches`, and its pictures."""
    size = (settings["size"][0], settings["size"][1])
    edit = Edit(model.prompts([settings["prompt"]], size), None, GUIDANCE)
    schedule = make_schedule(model, settings["steps"], "ddim")
    for first in ticked(batches, f"Class pictures, {BATCH} at once"):
        seeds = [settings["seed"] + number for number in range(first, first + BATCH)]
        yield first, [to_image(row) for row in model.decode(sample(model, edit, seeds, schedule, size))]
