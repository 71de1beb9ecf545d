"""The pictures of a subject, as people have them: one file, a folder, or a data set; a caption each, a mask if wanted.

Folders and data sets are read by 🤗 datasets: `metadata.jsonl` beside the pictures may hold `file_name`, a caption
(`text`, see --caption_column) and `mask_file_name`, a picture that is white where the subject is.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from personalize.captions import describe, find_caption, sidecar_caption
from personalize.data import find_picture
from personalize.errors import UserError
from personalize.images import resize_and_crop, fitted_size, load_image, read_image, to_pixels

MASK_COLUMN = "mask"  # what 🤗 datasets makes of `mask_file_name`


@dataclass(frozen=True)
class TrainingImage:
    """One picture: `name` for messages, what it shows, and where its subject is (white), or None: everywhere."""

    name: str
    image: Image.Image
    caption: str
    mask: Image.Image | None = None

    def __post_init__(self) -> None:
        mask = self.mask
        if mask is not None and mask.size != self.image.size:
            sizes = f"{mask.width}×{mask.height} px, the picture {self.image.width}×{self.image.height}"
            raise UserError(f"the mask of {self.name} is {sizes}: make it so")
        if mask is not None and mask.convert("L").getextrema()[1] == 0:
            raise UserError(f"the mask of {self.name} is all black: paint white where the subject is")


def read_subject(config: Any) -> list[TrainingImage]:
    """The pictures that a trainer's options name, in exactly one of its ways.

    Raises:
        UserError: no picture, several sources, no words for a picture, a mask that does not fit.
    """
    places = [path for path in (config.picture, config.instance_image, config.instance_data_dir) if path is not None]
    given = len(places) + (config.dataset_name is not None)
    if given != 1:
        raise UserError(f"name one picture, folder or data set, e.g. `single_image photo.jpg`; got {given}")
    if places and not places[0].is_dir():
        path = find_picture(places[0])
        mask = None if config.instance_mask is None else load_image(config.instance_mask)
        return [TrainingImage(str(path), load_image(path), find_caption(path, config.caption, config.caption_model), mask)]
    if config.instance_mask is not None:
        raise UserError("instance_mask belongs to one picture: in a folder, give mask_file_name in its metadata.jsonl")
    with tempfile.TemporaryDirectory() as cache:  # a folder is read anew each time, so that nothing is ever stale
        source = {"path": config.dataset_name} if not places else {"path": "imagefolder", "data_dir": str(places[0])}
        extra = {"drop_labels": True, "cache_dir": cache} if places else {}
        where = str(config.dataset_name or places[0])
        rows = load_rows(where, config.image_column, **source, **extra)
        shown = [_shown(row, f"{where}, picture {number}", config) for number, row in enumerate(rows, 1)]
    if not shown:
        raise UserError(f"{where} holds no picture: put PNG or JPEG files into it")
    return shown


def load_rows(where: str, *image_columns: str, **arguments: Any) -> Iterator[dict[str, Any]]:
    """Rows of the training split, `image_columns` (the first must exist) left undecoded: {"path": …, "bytes": …}.

    Raises:
        UserError: the data set cannot be loaded, or has no such column of pictures.
    """
    try:
        from datasets import Image as Picture
        from datasets import disable_progress_bars, load_dataset
    except ImportError:
        raise UserError(f"{where} needs the package datasets: pip install datasets") from None
    disable_progress_bars()
    try:
        rows: Any = load_dataset(split="train", **arguments)
    except Exception as error:  # the library raises whatever its readers raise
        raise UserError(f"{where} cannot be loaded: {(str(error) or type(error).__name__).splitlines()[0]}") from None
    if not isinstance(rows.features.get(image_columns[0]), Picture):
        columns = ", ".join(rows.features) or "none"
        raise UserError(f"{where} has no pictures in column {image_columns[0]!r}; its columns are {columns}")
    for name, feature in rows.features.items():
        if isinstance(feature, Picture):
            rows = rows.cast_column(name, Picture(decode=False))
    return iter(rows)


def opened(cell: Mapping[str, Any], name: str) -> Image.Image:
    """The picture of an undecoded cell, upright and in RGB as `load_image` has it."""
    if cell.get("bytes") is not None:
        return read_image(BytesIO(cell["bytes"]), name)
    return load_image(cell["path"])


def _shown(row: Mapping[str, Any], name: str, config: Any) -> TrainingImage:
    cell = row[config.image_column]
    path = Path(cell["path"]) if cell.get("path") and cell.get("bytes") is None else None
    image, mask = opened(cell, name), row.get(MASK_COLUMN)
    words = " ".join(str(row.get(config.caption_column) or "").split())
    words = words or (sidecar_caption(path) if path else None) or config.caption
    if not words and config.caption_model is not None:
        words = describe(image, config.caption_model)
    if not words or not words.strip():
        raise UserError(
            f"{path or name} has no caption: pass --caption 'a photo of …' for all, or put one each into a .txt file "
            f"beside it, into column {config.caption_column!r} of metadata.jsonl, or name a --caption_model"
        )
    name = str(path or name)
    return TrainingImage(name, image, " ".join(words.split()), None if mask is None else opened(mask, f"the mask of {name}"))


def fitted(shown: Sequence[TrainingImage], resolution: int, multiple: int) -> tuple[Tensor, Tensor | None]:
    """All pictures in one size: pixels (p, 3, H, W) in [−1, 1], and masks (p, 1, H, W) in [0, 1] if any has one.

    The size is that of `images.fit` where it is the same for all of them, otherwise a square, cut out of the middle.
    """
    sizes = {fitted_size(one.image.height, one.image.width, resolution, multiple) for one in shown}
    side = resolution // multiple * multiple
    size = sizes.pop() if len(sizes) == 1 else (side, side)
    pixels = torch.cat([to_pixels(resize_and_crop(one.image, size)) for one in shown])
    if all(one.mask is None for one in shown):
        return pixels, None
    white = Image.new("L", (size[1], size[0]), 255)
    masks = [white if one.mask is None else resize_and_crop(one.mask, size) for one in shown]
    return pixels, torch.cat([(to_pixels(mask)[:, :1] + 1) / 2 for mask in masks])
