"""Regularisation pictures, which keep "cat" meaning cats: a folder, a data set, or drawn by the base itself.

Without them the class words take on the look of the one picture (language drift).  What the base draws is kept in a
folder named by a hash of all that decides it, so that a second run finds it.

References: Kumari et al., "Multi-Concept Customization of Text-to-Image Diffusion", arXiv 2212.04488, §3.2.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

from personalize.captions import sidecar_caption
from personalize.concept_data import ClassImage
from personalize.errors import UserError
from personalize.files import read_json, write_folder
from personalize.images import IMAGE_SUFFIXES, to_image
from personalize.model import StableDiffusion
from personalize.pictures import png
from personalize.sampling import Edit, make_schedule, sample
from personalize.subject import load_rows, opened

TOLD = "about.json"  # in a folder of drawn pictures: what they were drawn from
CACHE = Path("~/.cache/personalize/regularisation")
GUIDANCE, BATCH = 6.0, 4  # Custom Diffusion's guidance


def examples(config: Any, model: StableDiffusion, prompt: str, size: tuple[int, int], lead: Any) -> list[ClassImage]:
    """The class pictures that a trainer's options (`recipes.PriorPreservationOptions`) ask for, from the first source that is named.

    `prompt` is what they show, `size` (H, W) that of those which the base draws, on the process that leads (`lead` is
    the accelerator) and for all of them.

    Raises:
        UserError: none asked for by number, or a source that cannot be read.
    """
    if not config.with_prior_preservation:
        return []
    count = config.num_class_images
    if count < 1:
        raise UserError(f"num_class_images must be above 0, got {count}; or use --no_with_prior_preservation")
    if config.class_data_dir is not None:
        return from_folder(config.class_data_dir, prompt, count)
    if config.class_dataset_name is not None:
        columns = {"image_column": config.image_column, "caption_column": config.caption_column}
        return from_dataset(config.class_dataset_name, prompt, count, **columns)
    lead.print(f"Class pictures: {count} of “{prompt}”, drawn by the base once")
    with lead.main_process_first():
        return from_base(
            model, prompt, count, size=size, steps=config.class_image_steps, seed=config.seed,
            cache=config.class_image_cache,
        )  # fmt: skip


def from_folder(folder: str | Path, class_prompt: str, count: int | None = None) -> list[ClassImage]:
    """The pictures in `folder` by name, `count` at most, captioned by the .txt beside each, or else by `class_prompt`.

    Raises:
        UserError: no folder, or no picture in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"class_data_dir {folder} is no folder: name one with regularisation pictures")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    if not paths:
        raise UserError(f"class_data_dir {folder} holds no picture: put PNG or JPEG files into it")
    return [ClassImage(sidecar_caption(path) or class_prompt, path) for path in paths[:count]]


def from_dataset(name: str, class_prompt: str, count: int, *, image_column: str, caption_column: str) -> list[ClassImage]:
    """The first `count` rows of the training split of a data set: a hub id, or a local folder `load_dataset` knows.

    Raises:
        UserError: it cannot be loaded, or lacks the image column; without a caption column `class_prompt` is used.
    """
    rows = islice(load_rows(f"class_dataset_name {name}", image_column, path=name), count)
    return [
        ClassImage(" ".join(str(row.get(caption_column) or class_prompt).split()), opened(row[image_column], name))
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
) -> list[ClassImage]:
    """`count` pictures (H, W) = `size` that the base draws of `class_prompt`, drawn at most once.

    With DDIM, guidance 6 and the seeds `seed`, `seed` + 1, …

    Raises:
        UserError: the cache cannot be written.
    """
    about = {
        "base": model.identity["sha256"], "prompt": class_prompt, "count": count, "size": list(size), "steps": steps,
        "seed": seed, "guidance": GUIDANCE,
    }  # fmt: skip
    key = sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    folder = Path(cache or CACHE).expanduser() / key
    if not (folder / TOLD).is_file() or read_json(folder / TOLD) != about:
        files = {f"{number:04d}.png": png(image) for number, image in enumerate(_drawn(model, about))}
        folder.parent.mkdir(parents=True, exist_ok=True)
        write_folder(folder, files | {TOLD: json.dumps(about, indent=1).encode()})
    return from_folder(folder, class_prompt, count)


def _drawn(model: StableDiffusion, about: dict[str, Any]) -> Iterator[Image.Image]:
    size = (about["size"][0], about["size"][1])
    edit = Edit(model.prompts([about["prompt"]], size), None, GUIDANCE)
    plan = make_schedule(model, about["steps"], "ddim")
    for first in range(0, about["count"], BATCH):
        seeds = [about["seed"] + number for number in range(first, min(first + BATCH, about["count"]))]
        for row in model.decode(sample(model, edit, seeds, plan, size)):
            yield to_image(row)
