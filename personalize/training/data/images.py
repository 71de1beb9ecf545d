"""Read the training pictures of a subject from files, a folder or a data set, with captions and optional masks.

Folders are read by `personalize.io.image_folders`, data sets by 🤗 datasets.  A caption stands in the column `text` of
the metadata (see --caption_column) or in a text file beside the picture; `mask_file_name` names a picture that is white
where the subject is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

from PIL import Image

from personalize.errors import UserError, first_line
from personalize.io.image_files import load_image, read_image
from personalize.io.image_folders import FolderImage
from personalize.io.image_metadata import sidecar_caption
from personalize.io.mask_files import as_mask, check_mask, load_mask, read_mask
from personalize.io.plain_files import require_plain_tree
from personalize.models.offline import without_network
from personalize.training.data.captions import (
    folder_caption,
    generate_caption,
    no_caption,
    no_caption_in_row,
    row_caption,
)
from personalize.training.data.sources import CAPTION_COLUMN, MASK_FILE, instance_places, named_pictures

MASK_COLUMN = "mask"  # the column that 🤗 datasets makes of it


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
        if mask is not None:
            named = f"the mask of {self.name}"
            object.__setattr__(self, "mask", grey := as_mask(mask, named))
            check_mask(grey, named)


def read_training_images(config: Any) -> list[TrainingImage]:
    """The pictures that a trainer's options name: files, a folder or a data set, exactly one of them.

    Raises:
        UserError: no picture, several sources, a picture without a caption, or a mask of another size.
    """
    places = instance_places(config)
    masks = () if config.instance_mask is None else (config.instance_mask,)
    if places:
        return load_pictures(named_pictures(places, config, masks), config)
    if masks:
        raise UserError("instance_mask is for files and folders: in a data set, give a column 'mask' of pictures")
    where, column = config.dataset_name, config.caption_column
    rows = enumerate(load_rows(where, config.image_column, path=where), 1)
    named = [(row, f"{where}, picture {number}") for number, row in rows]
    for row, name in named[:1]:  # all have the same columns; class pictures may have one that these have not
        if column not in row and column != CAPTION_COLUMN and config.class_dataset_name is None:
            raise no_caption_in_row(name, row, column)
    return [_from_row(row, name, config) for row, name in named]


def load_pictures(named: Sequence[FolderImage], config: Any) -> list[TrainingImage]:
    """The pictures `named`, with their masks, and with a caption each: its own, or the one of `config`, or its model's.

    Raises:
        UserError: a picture that cannot be read or has no caption, or a mask of another size.
    """
    return [_from_folder(image, config) for image in named]


def _from_folder(named: FolderImage, config: Any) -> TrainingImage:
    image, mask = load_image(named.path), named.files.get(MASK_FILE)
    caption = _caption(folder_caption(named, config.caption_column), image, config)
    if not caption:
        raise no_caption(named.path, config.caption_column)
    return TrainingImage(str(named.path), image, caption, load_mask(mask) if mask else None)


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
    require_plain_tree(str(arguments.get("path", "")))
    try:
        with _uncounted(Path(str(arguments.get("path", "")))):
            rows: Any = load_dataset(split="train", **arguments)
    except Exception as error:  # the library raises whatever its readers raise
        raise UserError(f"{where} cannot be loaded: {first_line(error)}") from None
    if not isinstance(rows.features.get(image_columns[0]), Picture):
        columns = ", ".join(rows.features) or "none"
        raise UserError(f"{where} has no pictures in column {image_columns[0]!r}; its columns are {columns}")
    for name, feature in rows.features.items():
        if isinstance(feature, Picture):
            rows = rows.cast_column(name, Picture(decode=False))
    return iter(rows)


@contextmanager
def _uncounted(path: Path) -> Iterator[None]:
    """Run the body without the network, if `path` is on this machine: 🤗 datasets would count its loads at the hub."""
    from datasets import config

    local = path.exists()
    with ExitStack() as stack:
        stack.enter_context(without_network(local))
        if local:
            stack.enter_context(patch.object(config, "HF_HUB_OFFLINE", True))
            stack.enter_context(patch.object(config, "HF_UPDATE_DOWNLOAD_COUNTS", False))
        yield


def decode_cell(cell: Any, name: str, *, mask: bool = False) -> Image.Image:
    """The picture in a cell of `load_rows`, upright and in RGB as from `load_image`; a `mask` as from `load_mask`.

    Raises:
        UserError: the cell is empty or holds no picture, or one that cannot be read.
    """
    if not isinstance(cell, Mapping) or (cell.get("bytes") is None and not cell.get("path")):
        what = "holds nothing" if cell is None or isinstance(cell, Mapping) else f"is {repr(cell)[:80]}"
        todo = f"leave out or rename the column {MASK_COLUMN!r}" if mask else "leave out its row"
        raise UserError(f"{name} {what}, expected a picture in the data set's cell: {todo}")
    if cell.get("bytes") is not None:
        return (read_mask if mask else read_image)(BytesIO(cell["bytes"]), name)
    return (load_mask if mask else load_image)(cell["path"])


def _from_row(row: Mapping[str, Any], name: str, config: Any) -> TrainingImage:
    """The picture in a row of a data set."""
    cell, mask = row[config.image_column], row.get(MASK_COLUMN)
    image = decode_cell(cell, name)
    path, column = Path(cell["path"]) if cell.get("path") and cell.get("bytes") is None else None, config.caption_column
    words = row_caption(row, column, name) or (sidecar_caption(path) if path else None)
    decoded = None if mask is None else decode_cell(mask, f"the mask of {path or name}", mask=True)
    caption = _caption(words, image, config)
    if not caption:
        raise no_caption_in_row(str(path or name), row, column)
    return TrainingImage(str(path or name), image, caption, decoded)


def _caption(words: str | None, image: Image.Image, config: Any) -> str:
    """The picture's own `words`, else the options' caption for all, else that of a captioning model; "" if none."""
    caption = " ".join((words or config.caption or "").split())
    if not caption and config.caption_model is not None:
        caption = generate_caption(image, config.caption_model)
    return caption
