"""Read the table of a catalogue: the rows that can be trained on, and for the others the reason why not."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from io import StringIO
from pathlib import Path
from typing import Any, get_args, get_type_hints

from personalize.errors import UserError, nearest
from personalize.io.atomic import plain_name
from personalize.io.image_folders import only_picture
from personalize.training.config import SingleImageConfig

OWN_COLUMNS = ("image", "caption", "name")
DONE, FAILED = "done", "failed"
RESULTS = "results"  # folder of the outcomes, beside the adapters
_YES, _NO = {"true", "yes", "on", "1"}, {"false", "no", "off", "0"}


@dataclass(frozen=True)
class Item:
    """One row: the picture, its caption if the table has one, the adapter's name, and settings of its own."""

    line: int
    name: str
    image: Path
    caption: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


def read_items(table: str | Path, config: SingleImageConfig) -> tuple[list[Item], list[dict[str, Any]]]:
    """The rows of a CSV file that can be trained on, and the outcomes of those that cannot.

    Columns: image (a path, relative to the table), caption, name, and any field of `SingleImageConfig`.  An empty cell
    means the value in `config`, an empty name the picture's file name.

    Raises:
        UserError: no such file, not UTF-8, no column "image", an unknown column, or no row at all.
    """
    rows = _rows(Path(table))
    items, failed, names = [], [], {}
    for line, row in rows:
        try:
            item = _item(Path(table).parent, line, row, config)
            if (first := names.setdefault(item.name.casefold(), line)) != line:
                raise UserError(f"the name {item.name!r} is taken by line {first}: give each row its own")
            items.append(item)
        except UserError as error:
            failed.append(outcome(line, row.get("name") or row.get("image") or "", FAILED, reason=str(error)))
    return items, failed


def _rows(table: Path) -> list[tuple[int, dict[str, str]]]:
    """The line number and the cells by column of every row that is not empty."""
    try:
        text = table.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{table} is not UTF-8 text: save the table as UTF-8 CSV") from None
    reader = csv.DictReader(StringIO(text, newline=""), restkey="")
    columns, known = list(reader.fieldnames or ()), [*OWN_COLUMNS, *(one.name for one in fields(SingleImageConfig))]
    if "image" not in columns:
        raise UserError(f"{table} has the columns {', '.join(columns) or 'none'}: expected image, caption, name, …")
    if unknown := [column for column in columns if column not in known]:
        raise UserError(f"unknown column {unknown[0]!r} in {table}: {nearest(unknown[0], known)}")
    rows = []
    for row in reader:
        cells = {key: (value or "").strip() for key, value in row.items() if isinstance(value, str) or value is None}
        if any(cells.values()):
            rows.append((reader.line_num, cells | ({"": "more"} if row.get("") else {})))
    if not rows:
        raise UserError(f"{table} has no row below its header")
    return rows


def _item(folder: Path, line: int, row: Mapping[str, str], config: SingleImageConfig) -> Item:
    """The row as an item; UserError if it cannot be trained on.  No picture or model is loaded."""
    if "" in row:
        raise UserError("the row has more cells than the header has columns: put quotes around cells with commas")
    if not row["image"]:
        raise UserError("the cell of the column image is empty: name a picture file")
    image = only_picture(folder / Path(row["image"]).expanduser())
    name = plain_name(row.get("name") or image.stem)
    if name.startswith(".") or name.casefold() == RESULTS:
        raise UserError(f"an adapter cannot be called {name!r}: choose another name")
    types = get_type_hints(SingleImageConfig)
    given = {key: text for key, text in row.items() if text and key not in OWN_COLUMNS}
    options = {key: _value(key, types[key], text) for key, text in given.items()}
    replace(config, **options)  # raises if the values cannot work
    return Item(line, name, image, row.get("caption") or None, options)


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
    if str in types or text in types:
        return text
    raise UserError(f"column {name}: {text!r} is not of the type {_type_name(hint)}")


def _type_name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


def outcome(line: int, name: str, status: str, **more: Any) -> dict[str, Any]:
    """The outcome of a row, as it is written to the results."""
    return {"line": line, "name": name, "status": status, **more}
