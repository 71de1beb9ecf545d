"""Class pictures for regularisation (prior preservation): from a folder, a data set, or drawn by the base itself.

Without them the class words take on the look of the one picture (language drift).  What the base draws is cached in a
folder named by a hash of all the settings that decide it, so that a second run reuses it.

References: Kumari et al., "Multi-Concept Customization of Text-to-Image Diffusion", arXiv 2212.04488, §3.2.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image

from personalize.errors import UserError
from personalize.io.atomic import write_folder
from personalize.io.figures import png
from personalize.io.image_folders import read_folder
from personalize.io.images import to_image
from personalize.io.json_files import read_json
from personalize.io.progress import ticked
from personalize.io.provenance import GENERATED
from personalize.models.stable_diffusion import StableDiffusion
from personalize.sampling.denoise import Edit, sample
from personalize.sampling.schedule import make_schedule
from personalize.training.data.captions import folder_caption
from personalize.training.data.concepts import ClassImage
from personalize.training.data.images import decode_cell, load_rows

METADATA = "about.json"  # in a folder of drawn pictures: the settings they were drawn with
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
    if count < 1:
        raise UserError(f"num_class_images must be above 0, got {count}; or use --no_with_prior_preservation")
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
        UserError: the data set cannot be loaded, or lacks the image column.
    """
    rows = islice(load_rows(f"class_dataset_name {name}", image_column, path=name), count)
    return [
        ClassImage(" ".join(str(row.get(caption_column) or class_prompt).split()), decode_cell(row[image_column], name))
        for row in rows
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
    """`count` pictures of (H, W) = `size` that the base draws of `class_prompt`; read from the cache if it has them.

    They are drawn by DDIM in `steps` steps with guidance 6 and the seeds `seed`, `seed` + 1, …  With an `accelerator`
    of several processes each draws a part, in the batches that a single process draws, so that the pictures are equal.

    Raises:
        UserError: the cache cannot be written.
    """
    settings = {
        "base": model.identity["sha256"], "prompt": class_prompt, "count": count, "size": list(size), "steps": steps,
        "seed": seed, "guidance": GUIDANCE, "precision": str(model.dtype).removeprefix("torch."),
    }  # fmt: skip
    key = sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    folder = Path(cache or CACHE).expanduser() / key
    group: Any = accelerator or PartialState()
    several = group.num_processes > 1
    complete = (folder / METADATA).is_file() and read_json(folder / METADATA) == settings
    if not all(gather_object([complete]) if several else [complete]):
        numbered = _draw(model, settings, group.process_index, group.num_processes)
        drawn = {f"{number:04d}.png": png(image, GENERATED) for number, image in numbered}
        files = dict(gather_object([*drawn.items()])) if several else drawn
        if not complete and group.is_local_main_process:
            folder.parent.mkdir(parents=True, exist_ok=True)
            write_folder(folder, files | {METADATA: json.dumps(settings, indent=1).encode()})
        if several:
            group.wait_for_everyone()
    return from_folder(folder, class_prompt, count)


def _draw(
    model: StableDiffusion, settings: dict[str, Any], process: int, processes: int
) -> Iterator[tuple[int, Image.Image]]:
    """The pictures of every `processes`-th batch, from batch number `process` on, with their numbers."""
    size = (settings["size"][0], settings["size"][1])
    edit = Edit(model.prompts([settings["prompt"]], size), None, GUIDANCE)
    schedule = make_schedule(model, settings["steps"], "ddim")
    for first in ticked(
        range(process * BATCH, settings["count"], processes * BATCH), f"Class pictures, {BATCH} at once"
    ):
        numbers = range(first, min(first + BATCH, settings["count"]))
        seeds = [settings["seed"] + number for number in numbers]
        for number, row in zip(numbers, model.decode(sample(model, edit, seeds, schedule, size)), strict=True):
            yield number, to_image(row)
