"""Read the table of a catalogue: the rows that can be trained on, and for the others the reason why not."""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from threading import Lock
from typing import Any, get_args, get_type_hints

from personalize.errors import UserError, nearest
from personalize.io.atomic import plain_name
from personalize.io.image_folders import read_folder
from personalize.io.numbering import folded, windows_refuses
from personalize.io.tables import MORE, SURPLUS, place_of, read_table
from personalize.training.catalogue_results import FAILED, RESULTS, outcome
from personalize.training.checks import check_class_source, check_packages
from personalize.training.config import SingleImageConfig
from personalize.training.data.sources import named_pictures
from personalize.training.run_options import ONE_CLASS_SOURCE, PriorPreservationOptions

OWN_COLUMNS = ("image", "mask", "caption", "name")
SEPARATOR = "|"  # between the pictures, masks or captions of one cell
KINDS = (SingleImageConfig, PriorPreservationOptions)  # whose fields are columns
TABLE = "results.csv"
LONGEST_CELL, LONGEST_NAME = 2**17, 200  # characters; bytes
_LIMIT = Lock()
_YES, _NO = {"true", "yes", "on", "1"}, {"false", "no", "off", "0"}


@dataclass(frozen=True, kw_only=True)
class RowSources(PriorPreservationOptions):
    """What a row learns from: pictures, masks, captions and class pictures.

    picture: files, or folders of pictures.
    mask: one for each picture, or one folder of masks.
    caption: for all pictures without one of their own; of a single file it is the caption.
    captions: one for each picture, which takes the place of its own.
    """

    picture: tuple[Path, ...]
    mask: tuple[Path, ...] = ()
    caption: str | None = None
    captions: tuple[str, ...] = ()
    caption_model: str | None = None
    seed: int = 0


@dataclass(frozen=True)
class Item:
    """One row: the adapter's name, what it learns from, settings of its own, and what was left out of its folders."""

    line: int
    name: str
    sources: RowSources
    options: Mapping[str, Any] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()


def read_items(
    table: str | Path, config: SingleImageConfig, common: PriorPreservationOptions | None = None
) -> tuple[list[Item], list[dict[str, Any]]]:
    """The rows of a CSV file that can be trained on, and the outcomes of those that cannot.

    Columns: image, mask, caption, name, and any field of `SingleImageConfig` and of `PriorPreservationOptions`.  Paths
    are relative to the table, also those of class_data_dir, class_image_cache and a local class_dataset_name; image is
    a file, a folder, or several of them with `|` between, mask as many files or one folder of masks, caption one for
    all or one for each with `|` between.  An empty cell means the value in `config` or in `common`, an empty name that
    of the (first) file or folder.  A row that names class_data_dir or class_dataset_name has prior preservation.

    Raises:
        UserError: no such file, not UTF-8, no column "image", an unknown column, or no row at all.
    """
    with _any_cell_size():
        rows = _rows(Path(table))
    items, failed, names = [], [], {}
    for line, row in rows:
        try:
            item = _item(Path(table).parent, line, row, config, common or PriorPreservationOptions())
            if (first := names.setdefault(folded(item.name), line)) != line:
                raise UserError(f"the name {item.name!r} is taken by line {first}: give each row its own")
            items.append(item)
        except (UserError, OSError, ValueError) as error:  # e.g. a path too long for the system, or with a NUL in it
            reason = str(error) if isinstance(error, UserError) else getattr(error, "strerror", None) or str(error)
            name = (row.get("name") or row.get("image") or "")[:LONGEST_NAME]
            failed.append(outcome(line, name, FAILED, reason=reason))
    return items, failed


def _rows(table: Path) -> list[tuple[int, dict[str, str]]]:
    """The line number and the cells by column of every row that is not empty."""
    columns, found = read_table(table)
    known = [*OWN_COLUMNS, *(one.name for kind in KINDS for one in fields(kind))]
    if "image" not in columns:
        raise UserError(f"{table} has the columns {', '.join(columns) or 'none'}: expected image, caption, name, …")
    if unknown := [column for column in columns if column not in known]:
        raise UserError(f"unknown column {unknown[0]!r} in {table}: {nearest(unknown[0], known)}")
    rows = []
    for line, row in found:
        cells = {key: (value or "").strip() for key, value in row.items() if isinstance(value, str) or value is None}
        if any(cells.values()):
            long = [column for column, cell in cells.items() if len(cell) > LONGEST_CELL]
            cells |= dict.fromkeys(long, "")
            problem = f"the cell of the column {long[0]} has more than {LONGEST_CELL} characters" if long else ""
            problem = problem or (MORE if row.get(SURPLUS) else "")
            rows.append((line, cells | ({SURPLUS: problem} if problem else {})))
    if not rows:
        raise UserError(f"{table} has no row below its header")
    return rows


def _item(
    folder: Path, line: int, row: Mapping[str, str], config: SingleImageConfig, common: PriorPreservationOptions
) -> Item:
    """The row as an item; UserError if it cannot be trained on.  No picture or model is loaded."""
    if SURPLUS in row:
        raise UserError(row[SURPLUS])
    if not row["image"]:
        raise UserError("the cell of the column image is empty: name a picture file, or a folder of them")
    pictures, masks = (_paths(folder, row.get(column) or "") for column in ("image", "mask"))
    first = Path(os.path.abspath(pictures[0]))
    name = plain_name(row.get("name") or (first.name if first.is_dir() else first.stem))
    _check_name(name)
    options, own = (_options(kind, row) for kind in KINDS)
    settled = [other for name, other in SingleImageConfig.replaces.items() if name in options]
    options = dict.fromkeys(settled) | options  # as on a command line, whose options take the place of a file's
    check_packages(replace(config, **options))  # raises if the values cannot work
    if own.keys() & {"class_data_dir", "class_dataset_name"}:
        own = {"with_prior_preservation": True} | own
    own |= _places(folder, own)
    others = dict.fromkeys(ONE_CLASS_SOURCE[name] for name in own.keys() & ONE_CLASS_SOURCE)
    common_to_all = {one.name: getattr(common, one.name) for one in fields(PriorPreservationOptions)}
    shared: dict[str, Any] = common_to_all | others | own
    sources = RowSources(picture=pictures, mask=masks, **shared)
    check_class_source(sources)
    return Item(line, name, _captioned(sources, row.get("caption") or ""), options, tuple(_remarks(sources)))


def _places(folder: Path, own: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a row's `own` options that are paths, which are relative to the table's `folder`."""
    given = [name for name in ("class_data_dir", "class_image_cache") if name in own]
    places = {name: place_of(str(own[name]), folder) for name in given}
    local = place_of(own.get("class_dataset_name", ""), folder)
    return places | ({"class_dataset_name": str(local)} if "class_dataset_name" in own and local.exists() else {})


def _paths(folder: Path, cell: str) -> tuple[Path, ...]:
    """The files and folders that a cell names: one, or several with `|` between; UserError if one is not there."""
    whole = place_of(cell, folder)
    names = [cell] if whole.exists() else filter(None, map(str.strip, cell.split(SEPARATOR)))
    paths = tuple(place_of(name, folder) for name in names) if cell else ()
    for path in paths:
        if not path.exists():
            raise UserError(f"{path}: no such file or folder; check the path of the picture")
        if not path.is_file() and not path.is_dir():
            raise UserError(f"{path} is a device or a pipe: name a file or a folder")
    return paths


def _check_name(name: str) -> None:
    """UserError unless an adapter's folder can have this name on every system, beside our own files."""
    if name.startswith(".") or folded(name) in (RESULTS, TABLE) or windows_refuses(name):
        raise UserError(f"an adapter cannot be called {name!r}: choose another name")
    if len(name.encode(errors="surrogateescape")) > LONGEST_NAME:
        raise UserError(f"the name {name[:40]!r}… is too long: {LONGEST_NAME} bytes at most")


@contextmanager
def _any_cell_size() -> Iterator[None]:
    """Let the csv module read cells of any size in the body, so that one too long costs its row alone.

    The limit is the whole process's, so that one thread at a time may raise it.
    """
    with _LIMIT:
        limit = csv.field_size_limit(sys.maxsize if sys.maxsize < 2**31 else 2**31 - 1)
        try:
            yield
        finally:
            csv.field_size_limit(limit)


def _captioned(sources: RowSources, cell: str) -> RowSources:
    """`sources` with the caption of the cell, or with one for each picture; UserError if their numbers differ."""
    words = [" ".join(part.split()) for part in cell.split(SEPARATOR)]
    plain = replace(sources, caption=cell or None)
    if len(words) == 1 or len(named_pictures(sources.picture, plain, sources.mask)) == 1:
        sources = plain
    elif all(words):
        sources = replace(sources, captions=tuple(words))
    else:
        raise UserError(f"one of the captions in {cell!r} is empty: give one for all pictures, or one for each")
    if sources.mask or sources.captions:
        named_pictures(sources.picture, sources, sources.mask, sources.captions)  # raises if their numbers differ
    if sources.with_prior_preservation and not sources.class_prompt:
        raise UserError("class pictures need a class_prompt: what they show, e.g. 'a photo of a dog'")
    return sources


def _remarks(sources: RowSources) -> Iterator[str]:
    """What is left out of the row's folders; UserError if one of them holds no picture."""
    folders = [*sources.picture, *filter(None, [sources.class_data_dir])]
    for folder in folders:
        if folder.is_dir():
            yield from read_folder(folder).remarks()
        elif folder == sources.class_data_dir:
            raise UserError(f"{folder}: no such folder; check the path of the class pictures")


def _options(kind: type, row: Mapping[str, str]) -> dict[str, Any]:
    """The cells of `row` that are fields of the options class `kind`, as values."""
    types = get_type_hints(kind)
    return {key: _value(key, types[key], text) for key, text in row.items() if text and key in types}


def _value(name: str, hint: Any, text: str) -> Any:
    """The cell `text` as a value of the type `hint`, that of the field `name`."""
    types = set(get_args(hint)) - {type(None)} or {hint}
    if bool in types and text.lower() in _YES | _NO:
        return text.lower() in _YES
    for kind in (int, float):
        if kind in types:
            try:
                return kind(text)
            except ValueError:
                continue
    if Path in types:
        return Path(text)
    if str in types or text in types:
        return text
    raise UserError(f"column {name}: {text!r} is not of the type {_type_name(hint)}")


def _type_name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
