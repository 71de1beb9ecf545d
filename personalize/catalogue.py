"""Catalogue mode: one adapter for each row of a table, on one base model that stays loaded.

The rows are shared out over the processes of the launch, and each process learns its rows by itself.  An outcome is one
JSON line, appended and synced when the row is finished, so that a run killed at any moment goes on where it was.
"""

from __future__ import annotations

import csv
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from hashlib import sha256
from io import StringIO
from pathlib import Path
from typing import Any, get_args, get_type_hints

from accelerate import Accelerator

from personalize.adapter import check_target
from personalize.captions import find_caption
from personalize.data import find_picture
from personalize.errors import UserError
from personalize.files import plain_name, write_file
from personalize.images import fit, load_image
from personalize.learning import learning
from personalize.model import StableDiffusion
from personalize.options import nearest
from personalize.preview import preview
from personalize.recipes import Recipe
from personalize.teams import Team
from personalize.verify import MANIFEST

OWN_COLUMNS = ("image", "caption", "name")
DONE, FAILED = "done", "failed"
RESULTS = "results"  # folder of the outcomes, beside the adapters
COLUMNS = ("line", "name", "status", "reason", "adapter", "caption", "updates", "loss", "reconstruction_db", "seconds")
_YES, _NO = {"true", "yes", "on", "1"}, {"false", "no", "off", "0"}


@dataclass(frozen=True)
class Item:
    """One row: the picture to learn, its words if the table has them, the adapter's name, and options of its own."""

    line: int
    name: str
    image: Path
    caption: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Catalogue:
    """What all rows have in common."""

    output_dir: Path
    recipe: Recipe
    base: str = "embedded"  # and its revision: rows made with another base are made again
    resolution: int | None = None
    caption_model: str | None = None
    preview_steps: int = 0

    def recipe_of(self, item: Item) -> Recipe:
        return replace(self.recipe, **item.options)

    def digest(self, item: Item) -> str:
        """What decides the row's adapter, as a hash."""
        told = {
            "image": sha256(item.image.read_bytes()).hexdigest(), "caption": item.caption, "base": self.base,
            "resolution": self.resolution, "recipe": asdict(self.recipe_of(item)),
        }  # fmt: skip
        return sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def read_items(table: str | Path, recipe: Recipe) -> tuple[list[Item], list[dict[str, Any]]]:
    """The rows of a CSV file that can be learned, and the outcomes of those that cannot.

    Columns: image (beside the table, or absolute), caption, name, and any field of `Recipe`; an empty cell is the
    default, an empty name the picture's.

    Raises:
        UserError: no such file, not UTF-8, no column "image", an unknown column, or no row at all.
    """
    rows = _rows(Path(table))
    items, failed, names = [], [], {}
    for line, row in rows:
        try:
            item = _item(Path(table).parent, line, row, recipe)
            if (first := names.setdefault(item.name.casefold(), line)) != line:
                raise UserError(f"the name {item.name!r} is taken by line {first}: give each row its own")
            items.append(item)
        except UserError as error:
            failed.append(outcome(line, row.get("name") or row.get("image") or "", FAILED, reason=str(error)))
    return items, failed


def _rows(table: Path) -> list[tuple[int, dict[str, str]]]:
    """(line, column → cell) of every row that is not empty."""
    try:
        text = table.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{table} is not UTF-8 text: save the table as UTF-8 CSV") from None
    reader = csv.DictReader(StringIO(text, newline=""), restkey="")
    columns, known = list(reader.fieldnames or ()), [*OWN_COLUMNS, *(one.name for one in fields(Recipe))]
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


def _item(home: Path, line: int, row: Mapping[str, str], recipe: Recipe) -> Item:
    """The row as an item; UserError, without anything being loaded, if it cannot be learned."""
    if "" in row:
        raise UserError("the row has more cells than the header has columns: put quotes around cells with commas")
    if not row["image"]:
        raise UserError("the cell of the column image is empty: name a picture file")
    image = find_picture(home / row["image"])
    name = plain_name(row.get("name") or image.stem)
    if name.startswith(".") or name.casefold() == RESULTS:
        raise UserError(f"an adapter cannot be called {name!r}: choose another name")
    hints = get_type_hints(Recipe)
    given = {key: text for key, text in row.items() if text and key not in OWN_COLUMNS}
    options = {key: _value(key, hints[key], text) for key, text in given.items()}
    replace(recipe, **options)  # raises if the values cannot work
    return Item(line, name, image, row.get("caption") or None, options)


def _value(name: str, hint: Any, text: str) -> Any:
    """A cell as the recipe's field `name` wants it."""
    kinds = set(get_args(hint)) - {type(None)} or {hint}
    if bool in kinds and text.lower() in _YES | _NO:
        return text.lower() in _YES
    for kind in (int, float):
        if kind in kinds:
            try:
                return kind(text)
            except ValueError:
                continue
    if str in kinds or text in kinds:
        return text
    raise UserError(f"column {name}: {text!r} is not of the kind {_kind(hint)}")


def _kind(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


def outcome(line: int, name: str, status: str, **more: Any) -> dict[str, Any]:
    return {"line": line, "name": name, "status": status, **more}


class Results:
    """The outcomes in `folder`: each process appends to a file of its own and reads those of all."""

    def __init__(self, folder: Path, process: int = 0) -> None:
        self.folder, self.path = folder, folder / f"process-{process}.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        if self.path.is_file() and not self.path.read_bytes().endswith(b"\n"):
            os.truncate(self.path, self.path.read_bytes().rfind(b"\n") + 1)  # a torn line of a killed run

    def add(self, row: Mapping[str, Any]) -> None:
        """Append one outcome; it is on the disk, whole, when this returns."""
        handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(handle, (json.dumps({**row, "time": round(time.time(), 3)}) + "\n").encode())
            os.fsync(handle)
        finally:
            os.close(handle)

    def rows(self) -> dict[str, dict[str, Any]]:
        """The latest outcome of each name; refused rows without a name of their own are kept by line."""
        lines = [
            line for path in sorted(self.folder.glob("process-*.jsonl")) for line in path.read_bytes().split(b"\n")
        ]
        found = sorted((row for row in map(_parsed, lines) if row), key=lambda row: row["time"])
        return {f"{row['line']}:{row['name']}": row for row in found}


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
        return row if {"line", "name", "status", "time"} <= set(row) else None
    except (ValueError, TypeError):
        return None


def finished(item: Item, rows: Mapping[str, Mapping[str, Any]], catalogue: Catalogue) -> bool:
    """Has this very row been learned, and is its adapter still there?"""
    row = rows.get(f"{item.line}:{item.name}", {})
    there = (catalogue.output_dir / item.name / MANIFEST).is_file()
    return there and row.get("status") == DONE and row.get("digest") == catalogue.digest(item)


def learn_row(model: StableDiffusion, item: Item, catalogue: Catalogue, mixed_precision: str = "no") -> dict[str, Any]:
    """Learn one row and save its adapter; whatever goes wrong is the row's outcome, in one line.

    Only what stops a program (an interrupt, a full results file) gets out.
    """
    started = time.monotonic()
    try:
        told = _learned(model, item, catalogue, mixed_precision)
        row = outcome(item.line, item.name, DONE, digest=catalogue.digest(item), **told)
    except UserError as error:
        row = outcome(item.line, item.name, FAILED, reason=str(error))
    except Exception as error:  # a bug or a device out of memory on one row must not cost the others
        first = (str(error) or "no message").splitlines()[0]
        row = outcome(item.line, item.name, FAILED, reason=f"{type(error).__name__}: {first}")
    return row | {"seconds": round(time.monotonic() - started, 1)}


def _learned(model: StableDiffusion, item: Item, catalogue: Catalogue, mixed_precision: str) -> dict[str, Any]:
    recipe, folder = catalogue.recipe_of(item), catalogue.output_dir / item.name
    check_target(folder)
    caption = find_caption(item.image, item.caption, catalogue.caption_model)
    pixels, _ = fit(load_image(item.image), catalogue.resolution or model.resolution, 8 * model.factor)
    accelerator = Accelerator(
        cpu=model.device.type == "cpu", mixed_precision=mixed_precision,
        gradient_accumulation_steps=recipe.gradient_accumulation_steps,
    )  # fmt: skip
    loss = float("nan")
    with learning(model, pixels, caption, recipe, accelerator=accelerator) as run:
        for report in run.steps():
            loss = float(report.losses["loss"])
        adapter, updates = run.adapter(), run.update
    figures, pictures = preview(model, adapter, pixels, steps=catalogue.preview_steps, seed=recipe.seed)
    replace(adapter, info={**adapter.info, **figures}).save(folder, pictures=pictures)
    told = {"adapter": str(folder), "caption": caption, "updates": updates, "loss": round(loss, 5)}
    return told | {key: value for key, value in figures.items() if key in COLUMNS}


def write_table(rows: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """The outcomes as a CSV file, in the order of the lines, whole or not at all."""
    text = StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([row.get(column, "") for column in COLUMNS] for row in sorted(rows, key=lambda row: row["line"]))
    return write_file(path, text.getvalue().encode())


def run(
    items: Sequence[Item],
    refused: Sequence[Mapping[str, Any]],
    catalogue: Catalogue,
    load: Callable[[], StableDiffusion],
    team: Team,
    mixed_precision: str = "no",
) -> list[dict[str, Any]]:
    """Learn every row that is not finished yet; returns the outcomes of all rows of the table, of all processes."""
    results = Results(catalogue.output_dir / RESULTS, team.index)
    seen = {key: row for rows in team.gathered(results.rows()) for key, row in rows.items()}
    pending = [item for item in items if not finished(item, seen, catalogue)]
    for row in refused if team.index == 0 else ():
        results.add(row)
        say(row)
    if team.index == 0 and len(pending) < len(items):
        print(f"{len(items) - len(pending)} of {len(items)} rows are finished already", flush=True)
    mine = pending[team.index :: team.count]
    model = load() if mine else None
    for item in mine:
        assert model is not None
        row = learn_row(model, item, catalogue, mixed_precision)
        results.add(row)
        say(row)
    keys = {f"{item.line}:{item.name}" for item in items} | {f"{row['line']}:{row['name']}" for row in refused}
    everything = {key: row for rows in team.gathered(results.rows()) for key, row in rows.items()}
    return [row for key, row in everything.items() if key in keys]


def say(row: Mapping[str, Any]) -> None:
    """One line for one outcome."""
    told = row["reason"] if row["status"] == FAILED else f"loss {row['loss']:.4f}, {row['seconds']} s"
    print(f"line {row['line']}, {row['name'] or 'no name'}: {row['status']}: {told}", flush=True)
