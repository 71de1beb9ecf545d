"""Catalogue mode: one adapter for each row of a table, on one base model that stays loaded.

The rows are shared out over the processes of the launch, and each process learns its rows by itself.  An outcome is one
JSON line, appended and synced when the row is finished, so that a run killed at any moment goes on where it was.
"""

from __future__ import annotations

import csv
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from io import StringIO
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from personalize.adapter import Adapter, check_target
from personalize.captions import find_caption
from personalize.catalogue_table import DONE, FAILED, RESULTS, Item, outcome
from personalize.errors import UserError
from personalize.files import write_file
from personalize.images import fitted_pixels, fitted_size, load_image
from personalize.learning import single_image_run
from personalize.model import StableDiffusion
from personalize.preview import preview
from personalize.recipes import SingleImageConfig
from personalize.several import learn_batched
from personalize.teams import ProcessGroup
from personalize.verify import MANIFEST

COLUMNS = ("line", "name", "status", "reason", "adapter", "caption", "updates", "loss", "reconstruction_db", "seconds")


@dataclass(frozen=True)
class Catalogue:
    """What all rows have in common."""

    output_dir: Path
    recipe: SingleImageConfig
    base: str = "embedded"  # and its revision: rows made with another base are made again
    resolution: int | None = None
    caption_model: str | None = None
    preview_steps: int = 0
    adapters_per_batch: int = 1

    def recipe_of(self, item: Item) -> SingleImageConfig:
        return replace(self.recipe, **item.options)

    def digest(self, item: Item) -> str:
        """What decides the row's adapter, as a hash."""
        told = {
            "image": sha256(item.image.read_bytes()).hexdigest(), "caption": item.caption, "base": self.base,
            "resolution": self.resolution, "recipe": asdict(self.recipe_of(item)),
        }  # fmt: skip
        return sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


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


def learn_rows(
    model: StableDiffusion, items: Sequence[Item], catalogue: Catalogue, mixed_precision: str = "no"
) -> Iterator[dict[str, Any]]:
    """Learn rows together, in one batch; if that fails, one at a time, which tells whose fault it was."""
    started, several = time.monotonic(), []
    if len(items) > 1:
        try:
            several = _learned_together(model, items, catalogue, mixed_precision)
        except Exception as error:
            first = (str(error) or type(error).__name__).splitlines()[0]
            print(f"lines {items[0].line} to {items[-1].line} are learned one at a time: {first}", flush=True)
    seconds = round((time.monotonic() - started) / len(items), 1)
    for item, told in zip(items, several, strict=False):
        yield outcome(item.line, item.name, DONE, digest=catalogue.digest(item), **told) | {"seconds": seconds}
    for item in items if not several else ():
        yield learn_row(model, item, catalogue, mixed_precision)


def _learned(model: StableDiffusion, item: Item, catalogue: Catalogue, mixed_precision: str) -> dict[str, Any]:
    pixels, caption = _shown(model, item, catalogue)
    recipe, loss = catalogue.recipe_of(item), float("nan")
    accelerator = _accelerator(model, recipe, mixed_precision)
    with single_image_run(model, pixels, caption, recipe, accelerator=accelerator) as run:
        for report in run.steps():
            loss = float(report.losses["loss"])
        adapter = run.adapter()
    return _saved(model, item, catalogue, pixels, adapter, loss)


def _learned_together(
    model: StableDiffusion, items: Sequence[Item], catalogue: Catalogue, mixed_precision: str
) -> list[dict[str, Any]]:
    shown, recipe = [_shown(model, item, catalogue) for item in items], catalogue.recipe_of(items[0])
    found = learn_batched(model, shown, recipe, accelerator=_accelerator(model, recipe, mixed_precision))
    rows = zip(items, shown, found, strict=True)
    return [_saved(model, item, catalogue, pixels, *learned) for item, (pixels, _), learned in rows]


def _shown(model: StableDiffusion, item: Item, catalogue: Catalogue) -> tuple[Tensor, str]:
    """The row's picture as pixels, and its words."""
    check_target(catalogue.output_dir / item.name)
    caption = find_caption(item.image, item.caption, catalogue.caption_model)
    return fitted_pixels(load_image(item.image), catalogue.resolution or model.resolution, 8 * model.factor)[0], caption


def _accelerator(model: StableDiffusion, recipe: SingleImageConfig, mixed_precision: str) -> Accelerator:
    accumulation = recipe.gradient_accumulation_steps
    cpu = model.device.type == "cpu"
    return Accelerator(cpu=cpu, mixed_precision=mixed_precision, gradient_accumulation_steps=accumulation)


def _saved(
    model: StableDiffusion, item: Item, catalogue: Catalogue, pixels: Tensor, adapter: Adapter, loss: float
) -> dict[str, Any]:
    """What the outcome says of an adapter that has been learned, once it is saved."""
    folder, seed = catalogue.output_dir / item.name, catalogue.recipe_of(item).seed
    figures, pictures = preview(model, adapter, pixels, steps=catalogue.preview_steps, seed=seed)
    replace(adapter, info={**adapter.info, **figures}).save(folder, pictures=pictures)
    known = {"caption": adapter.info["caption"], "updates": adapter.info["updates"], "loss": round(loss, 5)}
    return {"adapter": str(folder), **known, **{key: figures[key] for key in figures if key in COLUMNS}}


def grouped(items: Sequence[Item], catalogue: Catalogue, resolution: int, multiple: int) -> list[list[Item]]:
    """Rows of one recipe and one size, up to `adapters_per_batch` of them together, in the order of their firsts."""
    groups: dict[Any, list[list[Item]]] = {}
    for item in items:
        try:
            picture = load_image(item.image)
            size = fitted_size(picture.height, picture.width, resolution, multiple)
        except Exception:  # whoever learns it will say what is wrong
            size = item.line
        last = groups.setdefault((catalogue.recipe_of(item), size), [[]])
        if len(last[-1]) == catalogue.adapters_per_batch:
            last.append([])
        last[-1].append(item)
    return sorted((group for several in groups.values() for group in several), key=lambda group: items.index(group[0]))


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
    team: ProcessGroup,
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
    for group in _groups(model, mine, catalogue):
        assert model is not None
        for row in learn_rows(model, group, catalogue, mixed_precision):
            results.add(row)
            say(row)
    keys = {f"{item.line}:{item.name}" for item in items} | {f"{row['line']}:{row['name']}" for row in refused}
    everything = {key: row for rows in team.gathered(results.rows()) for key, row in rows.items()}
    return [row for key, row in everything.items() if key in keys]


def _groups(model: StableDiffusion | None, items: Sequence[Item], catalogue: Catalogue) -> list[list[Item]]:
    if model is None or catalogue.adapters_per_batch == 1:
        return [[item] for item in items]
    return grouped(items, catalogue, catalogue.resolution or model.resolution, 8 * model.factor)


def say(row: Mapping[str, Any]) -> None:
    """One line for one outcome."""
    told = row["reason"] if row["status"] == FAILED else f"loss {row['loss']:.4f}, {row['seconds']} s"
    print(f"line {row['line']}, {row['name'] or 'no name'}: {row['status']}: {told}", flush=True)
