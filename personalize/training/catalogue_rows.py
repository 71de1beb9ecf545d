"""The rows of a catalogue: what decides the adapter of each, which are finished, and which can share a batch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from personalize.errors import UserError
from personalize.formats.adapter_folders import MANIFEST
from personalize.io.image_files import load_image
from personalize.io.image_folders import FolderImage, read_folder
from personalize.io.images import fitted_size
from personalize.io.plain_files import file_hash
from personalize.training.catalogue_results import DONE
from personalize.training.catalogue_table import Item, RowSources
from personalize.training.config import SingleImageConfig
from personalize.training.data.captions import folder_caption
from personalize.training.data.sources import MASK_FILE, named_pictures
from personalize.training.run_options import PriorPreservationOptions

_PLACES = ("class_image_cache", "class_data_dir")  # what lies there counts, not where it lies
PRIOR = tuple(one.name for one in fields(PriorPreservationOptions) if one.name not in _PLACES)
LOADED = ("variant", "prediction_type", "load_in_4bit", "mixed_precision")  # how the base is loaded and run


@dataclass(frozen=True)
class Catalogue:
    """The settings that all rows have in common; rows trained with others are trained again.

    base: what is loaded, and its revision; variant, prediction_type and load_in_4bit say how.
    mixed_precision: that of the forward passes, as Accelerate calls it.
    """

    output_dir: Path
    config: SingleImageConfig
    base: str = "embedded"
    resolution: int | None = None
    caption_model: str | None = None
    preview_steps: int = 0
    adapters_per_batch: int = 1
    variant: str | None = None
    prediction_type: str | None = None
    load_in_4bit: bool = False
    mixed_precision: str = "no"

    def config_of(self, item: Item) -> SingleImageConfig:
        """The training configuration of a row: the common one with the row's own settings."""
        return replace(self.config, **item.options)

    def sources_of(self, item: Item) -> RowSources:
        """What the row learns from, with its seed and the common model for captions."""
        return replace(item.sources, caption_model=self.caption_model, seed=self.config_of(item).seed)

    def row_hash(self, item: Item) -> str:
        """A hash of everything that decides the row's adapter, the contents of all its files among it."""
        sources = self.sources_of(item)
        classes = {name: str(getattr(sources, name)) for name in PRIOR if sources.with_prior_preservation}
        if Path(classes.get("class_dataset_name", "")).exists():
            classes.pop("class_dataset_name", None)  # a local one, whose files count
        inputs = {
            "pictures": [_contents(image, sources) for image in row_pictures(sources)], "base": self.base,
            "class_pictures": classes, "captioned_by": sources.caption_model,
            "class_files": [_contents(image, sources) for image in _class_files(sources)],
            "class_dataset": _dataset_files(sources),
            "resolution": self.resolution, "recipe": asdict(self.config_of(item)),
            **{name: getattr(self, name) for name in LOADED},
        }  # fmt: skip
        return sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]


def row_pictures(sources: RowSources) -> list[FolderImage]:
    """The pictures of a row with their masks and captions, in the order in which they are learned."""
    return named_pictures(sources.picture, sources, sources.mask, sources.captions)


def _class_files(sources: RowSources) -> tuple[FolderImage, ...]:
    given = sources.class_data_dir if sources.with_prior_preservation else None
    return () if given is None else read_folder(given).images[: sources.num_class_images]


def _dataset_files(sources: RowSources) -> list[str]:
    """Hashes of the files of a local data set of class pictures."""
    name = sources.class_dataset_name if sources.with_prior_preservation else None
    files = [] if name is None or sources.class_data_dir is not None else sorted(Path(name).rglob("*"))
    return [file_hash(path) for path in files if path.is_file()]


def _contents(image: FolderImage, sources: RowSources) -> list[str | None]:
    """Hashes of the picture's file and of its mask, and its caption."""
    files = [image.path, *(path for name, path in image.files.items() if name == MASK_FILE)]
    words = folder_caption(image, sources.caption_column) or sources.caption
    return [words, *(file_hash(path) for path in files)]


def is_finished(item: Item, outcomes: Mapping[str, Mapping[str, Any]], catalogue: Catalogue) -> bool:
    """Has this row, wherever it stood, been trained with the same settings, and does its adapter exist here?"""
    known = outcomes.get(item.name, {})
    if not (catalogue.output_dir / item.name / MANIFEST).is_file() or known.get("status") != DONE:
        return False
    return known["digest"] is not None and known["digest"] == digest_of(item, catalogue)


def digest_of(item: Item, catalogue: Catalogue) -> str | None:
    """The row's hash; None if a file of it cannot be read, which training the row will report."""
    try:
        return catalogue.row_hash(item)
    except (UserError, OSError):
        return None


def group_rows(items: Sequence[Item], catalogue: Catalogue, resolution: int, multiple: int) -> list[list[Item]]:
    """Groups of up to `adapters_per_batch` rows that can be learned together, ordered by their first rows."""
    groups: dict[Any, list[list[Item]]] = {}
    for item in items:
        try:
            kind = _kind(catalogue.sources_of(item), resolution, multiple) or item.line
        except Exception:  # training this row will report what is wrong
            kind = item.line
        of_kind = groups.setdefault((catalogue.config_of(item), kind), [[]])
        if len(of_kind[-1]) == catalogue.adapters_per_batch:
            of_kind.append([])
        of_kind[-1].append(item)
    return sorted((group for of_kind in groups.values() for group in of_kind), key=lambda group: items.index(group[0]))


def _kind(sources: RowSources, resolution: int, multiple: int) -> tuple[Any, ...] | None:
    """The number of pictures and their size, equal in all rows of a group; None for rows that are learned alone.

    Alone are rows of several sizes or captions, and those with class pictures.
    """
    if sources.with_prior_preservation:
        return None
    named = row_pictures(sources)
    images = [load_image(one.path) for one in named]  # a damaged one must not spoil the others' batch
    sizes = {fitted_size(image.height, image.width, resolution, multiple) for image in images}
    captions = {folder_caption(one, sources.caption_column) or sources.caption for one in named}
    generated = None in captions and len(named) > 1
    return None if len(sizes) > 1 or len(captions) > 1 or generated else (len(images), *sizes)
