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

from personalize.concept_data import Example
from personalize.data import SUFFIXES
from personalize.errors import UserError
from personalize.files import read_json, write_folder
from personalize.images import to_image
from personalize.model import StableDiffusion
from personalize.pictures import png
from personalize.sampling import Edit, moves, sample

TOLD = "about.json"  # in a folder of drawn pictures: what they were drawn from
CACHE = Path("~/.cache/personalize/regularisation")
GUIDANCE, BATCH = 6.0, 4  # Custom Diffusion's guidance


def from_folder(folder: str | Path, class_prompt: str, count: int | None = None) -> list[Example]:
    """The pictures in `folder` by name, `count` at most, captioned by the .txt beside each, or else by `class_prompt`.

    Raises:
        UserError: no folder, or no picture in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"class_data_dir {folder} is no folder: name one with regularisation pictures")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
    if not paths:
        raise UserError(f"class_data_dir {folder} holds no picture: put PNG or JPEG files into it")
    return [Example(_caption(path) or class_prompt, path) for path in paths[:count]]


def _caption(path: Path) -> str:
    sidecar = path.with_suffix(".txt")
    try:
        return " ".join(sidecar.read_text(encoding="utf-8-sig").split()) if sidecar.is_file() else ""
    except UnicodeDecodeError:
        raise UserError(f"{sidecar} is not UTF-8 text: save the caption as UTF-8") from None


def from_dataset(name: str, class_prompt: str, count: int, *, image_column: str, caption_column: str) -> list[Example]:
    """The first `count` rows of the training split of a data set: a hub id, or a local folder `load_dataset` knows.

    Raises:
        UserError: it cannot be loaded, or lacks the image column; without a caption column `class_prompt` is used.
    """
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError("class_dataset_name needs the package datasets: pip install datasets") from None
    try:
        rows: Any = load_dataset(name, split="train")
    except Exception as error:  # the library raises whatever its readers raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"class_dataset_name {name} cannot be loaded: {reason}") from None
    return list(_examples(islice(iter(rows), count), name, class_prompt, image_column, caption_column))


def _examples(rows: Any, name: str, class_prompt: str, image: str, caption: str) -> Iterator[Example]:
    for row in rows:
        picture = row.get(image)
        if not isinstance(picture, Image.Image):
            raise UserError(f"data set {name} has no pictures in column {image!r}; its columns are {sorted(row)}")
        yield Example(" ".join(str(row.get(caption) or class_prompt).split()), picture.convert("RGB"))


def from_base(
    model: StableDiffusion,
    class_prompt: str,
    count: int,
    *,
    side: int,
    steps: int = 50,
    seed: int = 0,
    cache: str | Path | None = None,
) -> list[Example]:
    """`count` pictures that the base draws of `class_prompt` (DDIM, guidance 6, seeds `seed` …), drawn at most once.

    Raises:
        UserError: the cache cannot be written.
    """
    about = {
        "base": model.identity["sha256"], "prompt": class_prompt, "count": count, "side": side, "steps": steps,
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
    size = (about["side"], about["side"])
    edit = Edit(model.prompts([about["prompt"]], size), None, GUIDANCE)
    plan = moves(model, about["steps"], "ddim")
    for first in range(0, about["count"], BATCH):
        seeds = [about["seed"] + number for number in range(first, min(first + BATCH, about["count"]))]
        for row in model.decode(sample(model, edit, seeds, plan, size)):
            yield to_image(row)
