"""Read the training pictures of a subject from one file, a folder or a data set, with captions and optional masks.

Folders and data sets are read by 🤗 datasets: `metadata.jsonl` beside the pictures may hold `file_name`, a caption
(`text`, see --caption_column) and `mask_file_name`, a picture that is white where the subject is.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from personalize.errors import UserError
from personalize.io.images import load_image, read_image
from personalize.training.data.captions import find_caption, generate_caption, sidecar_caption
from personalize.training.data.samples import find_picture

MASK_COLUMN = "mask"  # the column that 🤗 datasets makes of `mask_file_name`


@dataclass(frozen=True)
class TrainingImage:
    """One training picture: its `name` for messages, its caption, and a mask that is white where the subject is."""

    name: str
    image: Image.Image
    caption: str
    mask: Image.Image | None = None

    def __post_init__(self) -> None:
        mask = self.mask
        if mask is not None and mask.size != self.image.size:
            sizes = f"{mask.width}×{mask.height} px, the picture {self.image.width}×{self.image.height}"
            raise UserError(f"the mask of {self.name} is {sizes}: give it the same size")
        if mask is not None and mask.convert("L").getextrema()[1] == 0:
            raise UserError(f"the mask of {self.name} is all black: paint white where the subject is")


def read_training_images(config: Any) -> list[TrainingImage]:
    """The pictures that a trainer's options name: a file, a folder or a data set, exactly one of them.

    Raises:
        UserError: no picture, several sources, a picture without a caption, or a mask of another size.
    """
    places = [path for path in (config.picture, config.instance_image, config.instance_data_dir) if path is not None]
    given = len(places) + (config.dataset_name is not None)
    if given != 1:
        raise UserError(f"name one picture, folder or data set, e.g. `single_image photo.jpg`; got {given}")
    if places and not places[0].is_dir():
        path = find_picture(places[0])
        mask = None if config.instance_mask is None else load_image(config.instance_mask)
        caption = find_caption(path, config.caption, config.caption_model)
        return [TrainingImage(str(path), load_image(path), caption, mask)]
    if config.instance_mask is not None:
        raise UserError("instance_mask belongs to one picture: in a folder, give mask_file_name in its metadata.jsonl")
    with tempfile.TemporaryDirectory() as cache:  # folders are not cached: their files may have changed
        source = {"path": config.dataset_name} if not places else {"path": "imagefolder", "data_dir": str(places[0])}
        extra = {"drop_labels": True, "cache_dir": cache} if places else {}
        where = str(config.dataset_name or places[0])
        rows = load_rows(where, config.image_column, **source, **extra)
        images = [_training_image(row, f"{where}, picture {number}", config) for number, row in enumerate(rows, 1)]
    if not images:
        raise UserError(f"{where} holds no picture: put PNG or JPEG files into it")
    return images


def load_rows(where: str, *image_columns: str, **arguments: Any) -> Iterator[dict[str, Any]]:
    """The rows of a data set's training split, with pictures left undecoded as {"path": …, "bytes": …}.

    where: the data set, for messages; image_columns: the columns of pictures, of which the first must exist; arguments:
    those of `datasets.load_dataset`.

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


def decode_cell(cell: Mapping[str, Any], name: str) -> Image.Image:
    """The picture in a cell of `load_rows`, upright and in RGB as from `load_image`."""
    if cell.get("bytes") is not None:
        return read_image(BytesIO(cell["bytes"]), name)
    return load_image(cell["path"])


def _training_image(row: Mapping[str, Any], name: str, config: Any) -> TrainingImage:
    cell = row[config.image_column]
    path = Path(cell["path"]) if cell.get("path") and cell.get("bytes") is None else None
    image, mask = decode_cell(cell, name), row.get(MASK_COLUMN)
    caption = " ".join(str(row.get(config.caption_column) or "").split())
    caption = caption or (sidecar_caption(path) if path else None) or config.caption
    if not caption and config.caption_model is not None:
        caption = generate_caption(image, config.caption_model)
    if not caption or not caption.strip():
        raise UserError(
            f"{path or name} has no caption: pass --caption 'a photo of …' for all, or put one each into a .txt file "
            f"beside it, into column {config.caption_column!r} of metadata.jsonl, or name a --caption_model"
        )
    name = str(path or name)
    decoded = None if mask is None else decode_cell(mask, f"the mask of {name}")
    return TrainingImage(name, image, " ".join(caption.split()), decoded)
