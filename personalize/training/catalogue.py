"""Train one adapter for each row of a table, on one base model that stays loaded.

The rows are divided among the processes of the launch, and each process trains its own.  The outcome of a row is one
JSON line, appended and synced when the row is finished, so that a run killed at any moment can be started again and
repeats no finished row.
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

from personalize.adapters.adapter import Adapter
from personalize.adapters.adapter_files import check_target
from personalize.errors import UserError
from personalize.formats.manifest import MANIFEST
from personalize.io.atomic import write_file
from personalize.io.image_files import load_image
from personalize.io.images import fitted_size
from personalize.models.stable_diffusion import StableDiffusion
from personalize.training.batched_adapters import learn_batched
from personalize.training.catalogue_table import DONE, FAILED, RESULTS, Item, outcome
from personalize.training.config import SingleImageConfig
from personalize.training.data.buckets import FittedImage, fit
from personalize.training.data.captions import find_caption
from personalize.training.distributed import ProcessGroup
from personalize.training.single_image import single_image_run
from personalize.training.validation import save_with_preview

COLUMNS = ("line", "name", "status", "reason", "adapter", "caption", "updates", "loss", "reconstruction_db", "seconds")


@dataclass(frozen=True)
class Catalogue:
    """The settings that all rows have in common."""

    output_dir: Path
    config: SingleImageConfig
    base: str = "embedded"  # and its revision; rows trained on another base are trained again
    resolution: int | None = None
    caption_model: str | None = None
    preview_steps: int = 0
    adapters_per_batch: int = 1

    def config_of(self, item: Item) -> SingleImageConfig:
        """The training configuration of a row: the common one with the row's own settings."""
        return replace(self.config, **item.options)

    def row_hash(self, item: Item) -> str:
        """A hash of everything that decides the row's adapter."""
        inputs = {
            "image": sha256(item.image.read_bytes()).hexdigest(), "caption": item.caption, "base": self.base,
            "resolution": self.resolution, "recipe": asdict(self.config_of(item)),
        }  # fmt: skip
        return sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]


class Results:
    """The files of outcomes in `folder`: each process appends to its own, and reads those of all."""

    def __init__(self, folder: Path, process: int = 0) -> None:
        self.folder, self.path = folder, folder / f"process-{process}.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        if self.path.is_file() and not self.path.read_bytes().endswith(b"\n"):
            os.truncate(self.path, self.path.read_bytes().rfind(b"\n") + 1)  # a line that a killed run did not finish

    def add(self, row: Mapping[str, Any]) -> None:
        """Append one outcome; when this returns, the whole line is on the disk."""
        handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(handle, (json.dumps({**row, "time": round(time.time(), 3)}) + "\n").encode())
            os.fsync(handle)
        finally:
            os.close(handle)

    def rows(self) -> dict[str, dict[str, Any]]:
        """The latest outcome of each row, by "line:name"."""
        lines = [
            line for path in sorted(self.folder.glob("process-*.jsonl")) for line in path.read_bytes().split(b"\n")
        ]
        rows = sorted((row for row in map(_parsed, lines) if row), key=lambda row: row["time"])
        return {f"{row['line']}:{row['name']}": row for row in rows}


def _parsed(line: bytes) -> dict[str, Any] | None:
    """The outcome in a line of a results file; None if it is damaged."""
    try:
        row = json.loads(line)
        return row if {"line", "name", "status", "time"} <= set(row) else None
    except (ValueError, TypeError):
        return None


def is_finished(item: Item, rows: Mapping[str, Mapping[str, Any]], catalogue: Catalogue) -> bool:
    """Has this row been trained with the same settings, and does its adapter still exist?"""
    row = rows.get(f"{item.line}:{item.name}", {})
    exists = (catalogue.output_dir / item.name / MANIFEST).is_file()
    return exists and row.get("status") == DONE and row.get("digest") == catalogue.row_hash(item)


def learn_row(
    model: StableDiffusion, item: Item, catalogue: Catalogue, mixed_precision: str | None = "no"
) -> dict[str, Any]:
    """Train one row and save its adapter; any exception becomes the row's outcome, in one line.

    Only what stops the program (an interrupt) is raised.
    """
    started = time.monotonic()
    try:
        details = _train_row(model, item, catalogue, mixed_precision)
        row = outcome(item.line, item.name, DONE, digest=catalogue.row_hash(item), **details)
    except UserError as error:
        row = outcome(item.line, item.name, FAILED, reason=str(error))
    except Exception as error:  # a bug or a device out of memory on one row must not cost the others
        first = (str(error) or "no message").splitlines()[0]
        row = outcome(item.line, item.name, FAILED, reason=f"{type(error).__name__}: {first}")
    return row | {"seconds": round(time.monotonic() - started, 1)}


def learn_rows(
    model: StableDiffusion, items: Sequence[Item], catalogue: Catalogue, mixed_precision: str | None = "no"
) -> Iterator[dict[str, Any]]:
    """Train rows together, in one batch; if that fails, one at a time, so that each bad row has its own outcome."""
    started, together = time.monotonic(), []
    if len(items) > 1:
        try:
            together = _train_rows_together(model, items, catalogue, mixed_precision)
        except Exception as error:
            first = (str(error) or type(error).__name__).splitlines()[0]
            print(f"lines {items[0].line} to {items[-1].line} are learned one at a time: {first}", flush=True)
    seconds = round((time.monotonic() - started) / len(items), 1)
    for item, details in zip(items, together, strict=False):
        yield outcome(item.line, item.name, DONE, digest=catalogue.row_hash(item), **details) | {"seconds": seconds}
    for item in items if not together else ():
        yield learn_row(model, item, catalogue, mixed_precision)


def _train_row(model: StableDiffusion, item: Item, catalogue: Catalogue, mixed_precision: str | None) -> dict[str, Any]:
    pictures, caption = _load_row(model, item, catalogue)
    config, loss = catalogue.config_of(item), float("nan")
    accelerator = _accelerator(model, config, mixed_precision)
    with single_image_run(model, pictures, caption, config, accelerator=accelerator) as run:
        for report in run.steps():
            loss = float(report.losses["loss"])
        adapter = run.adapter()
    return _save(model, item, catalogue, pictures[0].pixels, adapter, loss)


def _train_rows_together(
    model: StableDiffusion, items: Sequence[Item], catalogue: Catalogue, mixed_precision: str | None
) -> list[dict[str, Any]]:
    pictures, config = [_load_row(model, item, catalogue) for item in items], catalogue.config_of(items[0])
    results = learn_batched(model, pictures, config, accelerator=_accelerator(model, config, mixed_precision))
    rows = zip(items, pictures, results, strict=True)
    return [_save(model, item, catalogue, images[0].pixels, *result) for item, (images, _), result in rows]


def _load_row(model: StableDiffusion, item: Item, catalogue: Catalogue) -> tuple[list[FittedImage], str]:
    """The row's picture in its training size, and its caption."""
    check_target(catalogue.output_dir / item.name)
    caption = find_caption(item.image, item.caption, catalogue.caption_model)
    picture = fit(load_image(item.image), None, catalogue.resolution or model.resolution, 8 * model.factor)
    return [picture], caption


def _accelerator(model: StableDiffusion, config: SingleImageConfig, mixed_precision: str | None) -> Accelerator:
    return Accelerator(cpu=model.device.type == "cpu", mixed_precision=mixed_precision)


def _save(
    model: StableDiffusion, item: Item, catalogue: Catalogue, pixels: Tensor, adapter: Adapter, loss: float
) -> dict[str, Any]:
    """Save a row's adapter, with a preview on its card; returns the details for the row's outcome."""
    folder, seed = catalogue.output_dir / item.name, catalogue.config_of(item).seed
    figures = save_with_preview(model, adapter, pixels, folder, steps=catalogue.preview_steps, seed=seed)
    details = {"caption": adapter.info["caption"], "updates": adapter.info["updates"], "loss": round(loss, 5)}
    return {"adapter": str(folder), **details, **{key: figures[key] for key in figures if key in COLUMNS}}


def group_rows(items: Sequence[Item], catalogue: Catalogue, resolution: int, multiple: int) -> list[list[Item]]:
    """Groups of up to `adapters_per_batch` rows of the same settings and picture size, ordered by their first rows."""
    groups: dict[Any, list[list[Item]]] = {}
    for item in items:
        try:
            picture = load_image(item.image)
            size = fitted_size(picture.height, picture.width, resolution, multiple)
        except Exception:  # training this row will report what is wrong
            size = item.line
        of_kind = groups.setdefault((catalogue.config_of(item), size), [[]])
        if len(of_kind[-1]) == catalogue.adapters_per_batch:
            of_kind.append([])
        of_kind[-1].append(item)
    return sorted((group for of_kind in groups.values() for group in of_kind), key=lambda group: items.index(group[0]))


def write_table(rows: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Write the outcomes as a CSV file, in the order of the table's lines, atomically."""
    text = StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([row.get(column, "") for column in COLUMNS] for row in sorted(rows, key=lambda row: row["line"]))
    return write_file(path, text.getvalue().encode())


def learn_catalogue(
    items: Sequence[Item],
    refused: Sequence[Mapping[str, Any]],
    catalogue: Catalogue,
    load: Callable[[], StableDiffusion],
    processes: ProcessGroup,
    mixed_precision: str | None = "no",
) -> list[dict[str, Any]]:
    """Train every row that is not finished yet; returns the outcomes of all rows, from all processes.

    refused: the outcomes of rows that cannot be trained on, see `read_items`; load: loads the base model, and is called
    only if this process has rows to train.
    """
    results = Results(catalogue.output_dir / RESULTS, processes.index)
    known = {key: row for rows in processes.all_gather(results.rows()) for key, row in rows.items()}
    pending = [item for item in items if not is_finished(item, known, catalogue)]
    for row in refused if processes.index == 0 else ():
        results.add(row)
        print_outcome(row)
    if processes.index == 0 and len(pending) < len(items):
        print(f"{len(items) - len(pending)} of {len(items)} rows are finished already", flush=True)
    own = pending[processes.index :: processes.count]
    model = load() if own else None
    for group in _groups(model, own, catalogue):
        assert model is not None
        for row in learn_rows(model, group, catalogue, mixed_precision):
            results.add(row)
            print_outcome(row)
    keys = {f"{item.line}:{item.name}" for item in items} | {f"{row['line']}:{row['name']}" for row in refused}
    outcomes = {key: row for rows in processes.all_gather(results.rows()) for key, row in rows.items()}
    return [row for key, row in outcomes.items() if key in keys]


def _groups(model: StableDiffusion | None, items: Sequence[Item], catalogue: Catalogue) -> list[list[Item]]:
    if model is None or catalogue.adapters_per_batch == 1:
        return [[item] for item in items]
    return group_rows(items, catalogue, catalogue.resolution or model.resolution, 8 * model.factor)


def print_outcome(row: Mapping[str, Any]) -> None:
    """Print one line about an outcome."""
    result = row["reason"] if row["status"] == FAILED else f"loss {row['loss']:.4f}, {row['seconds']} s"
    print(f"line {row['line']}, {row['name'] or 'no name'}: {row['status']}: {result}", flush=True)
