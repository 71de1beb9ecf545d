"""`personalize edit photos.csv`: edit the photos of a table, one row after the other, on one base model.

Each finished row is a line of results.jsonl, so that a run that was stopped goes on where it ended. A row that cannot
be edited costs a line of output, and is tried again by the next run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from hashlib import sha256
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from personalize.cli.commands.edit_image import EDITED, edit_one
from personalize.cli.edit_options import ROW_OPTIONS, PhotoConfig
from personalize.cli.parser import parse
from personalize.editing.editor import Editor
from personalize.errors import UserError, nearest, said_if_stopped
from personalize.formats.adapter_folders import ADAPTER_CONFIG, INDEX
from personalize.formats.adapter_source import fetched
from personalize.io.atomic import plain_name
from personalize.io.json_files import checked, parse_json
from personalize.io.numbering import folded, windows_refuses
from personalize.io.plain_files import at_home, file_hash, is_plain, read_bytes, read_text
from personalize.io.progress import ticked
from personalize.io.tables import MORE, SURPLUS, place_of, read_table
from personalize.models.config import InferenceOptions
from personalize.sampling.config import INVERSIONS

if TYPE_CHECKING:
    from personalize.cli.edit_options import EditTableConfig

RESULTS = "results.jsonl"
REPEATED = {field.name for field in fields(PhotoConfig) if field.type.startswith(("Annotated[tuple", "tuple"))}  # pyright: ignore
SWITCHES = {field.name for field in fields(PhotoConfig) if field.type == "bool"}
MASKS = ("mask", "background_mask", "region")  # columns that may name files
NEUTRAL = ("allow_download", "cpu")  # options of the table that do not decide its pictures
COLUMNS = ("file", "name", *ROW_OPTIONS)


@dataclass(frozen=True)
class Row:
    """A row of the table: its line, the name of its folder, and its cells by option, empty ones left out.

    problem: why it cannot be edited, if that is known.
    """

    line: int
    name: str
    file: Path
    cells: Mapping[str, str]
    problem: str | None = None


def run(config: EditTableConfig) -> Path:
    """Edit every row that is not finished, and return the output folder.

    Raises:
        UserError: the table cannot be read; or, after all other rows are finished, some failed.
    """
    rows = read_rows(config.table)
    adapters = [adapter_hashes(path) for path in config.adapters]
    done, editor, failed = finished(config.output_dir / RESULTS), None, 0
    for row in ticked(rows, "Photos"):
        stopped = (
            f"stopped in line {row.line}: {config.output_dir} has the finished rows; the same command edits the rest"
        )
        try:
            options = row_options(row, config)
            key = row_hash(row, config, adapters)
            if done.get(row.name) == key and has_pictures(options.output_dir):
                continue
            with said_if_stopped(stopped):
                editor = editor or Editor.configured(config, config.adapters)
                print(f"line {row.line}, {row.name}:")
                edit_one(options, editor, config.output_dir / INVERSIONS)
            append(config.output_dir / RESULTS, {"name": row.name, "line": row.line, "inputs": key})
        except UserError as error:
            failed += 1
            print(f"line {row.line}, {row.name}: not edited: {error}")
    if failed:
        raise UserError(f"{failed} of {len(rows)} rows were not edited, the others are in {config.output_dir}")
    print(f"{len(rows)} rows in {config.output_dir}, one folder each")
    return config.output_dir


def read_rows(table: Path) -> list[Row]:
    """The rows of a UTF-8 CSV file; `name` is the file's name without suffix by default, made unique by the line.

    Raises UserError: no such file, not UTF-8, no column file, an unknown column, or no row.
    """
    if not table.exists():
        raise UserError(f"{table}: no such file; name a CSV table with the columns file, source, target")
    columns, found = read_table(table)
    if "file" not in columns:
        raise UserError(f"{table} has the columns {', '.join(columns) or 'none'}: expected file, source, target, …")
    if unknown := [column for column in columns if column not in COLUMNS]:
        raise UserError(f"unknown column {unknown[0]!r} in {table}: {nearest(unknown[0], COLUMNS)}")
    rows: list[Row] = []
    for line, cells in found:
        given = {name: value.strip() for name, value in cells.items() if isinstance(value, str) and value.strip()}
        if not given:
            continue
        file, problem = given.pop("file", ""), MORE if cells.get(SURPLUS) else None
        name = given.pop("name", "") or Path(file.replace("\\", "/")).stem or f"row-{line}"
        if not file:
            problem = problem or "the cell of the column file is empty: name a picture"
        try:
            plain_name(name)
        except UserError as error:
            name, problem = f"row-{line}", problem or str(error)
        rows.append(Row(line, _unused_name(name, line, rows), place_of(file, table.parent), given, problem))
    if not rows:
        raise UserError(f"{table} has no row below its header")
    return rows


def _unused_name(name: str, line: int, rows: Sequence[Row]) -> str:
    """`name`, with the line's number behind it if an earlier row, one of our own files or a device has that name."""
    taken = {folded(row.name) for row in rows} | {RESULTS, INVERSIONS}
    if folded(name) not in taken and not windows_refuses(name):
        return name
    numbered = (f"{name.rstrip('. ')}-{line}{'' if number == 1 else f'-{number}'}" for number in count(1))
    return next(other for other in numbered if folded(other) not in taken and not windows_refuses(other))


def row_options(row: Row, config: EditTableConfig) -> PhotoConfig:
    """The row as options of `personalize edit PHOTO`, checked as on a command line.

    Cells of options that may be given several times are split at ";". Masks are relative to the table.
    """
    if row.problem is not None:
        raise UserError(row.problem)
    file = str(row.file)
    words = [os.path.join(os.curdir, file) if file.startswith("-") else file]  # a cell is never an option
    for name, cell in row.cells.items():
        for value in _values(name, cell):
            words.append(_as_flag(name, _beside_the_table(name, value, config.table)))
    options = parse(PhotoConfig, words, prog="personalize edit")
    shared = {field.name: getattr(config, field.name) for field in fields(InferenceOptions)}
    shared |= {"adapter": config.adapter, "add": config.add}
    options = replace(options, output_dir=config.output_dir / row.name, **shared)
    options.check()
    return options


def _values(name: str, cell: str) -> list[str]:
    """The values in the cell of an option, several if it may be given several times."""
    return [part.strip() for part in cell.split(";") if part.strip()] if name in REPEATED else [cell]


def _beside_the_table(name: str, value: str, table: Path) -> str:
    """The `value` of a column of masks, `noun=file` in that of regions, with a file's place relative to `table`'s."""
    if name not in MASKS:
        return value
    noun, equals, where = value.partition("=") if name == "region" else ("", "", value)
    beside = place_of(where, table.parent)
    return f"{noun}{equals}{beside if is_plain(beside) else where}"


def _as_flag(name: str, value: str) -> str:
    """`--seed=3`, also of a value that begins with a dash; of options without a value `--dpl` for yes, `--no_dpl`."""
    if name not in SWITCHES:
        return f"--{name}={value}"
    if value.lower() not in ("yes", "true", "1", "no", "false", "0"):
        raise UserError(f"column {name}: {value!r} is neither yes nor no")
    return f"--{name}" if value.lower() in ("yes", "true", "1") else f"--no_{name}"


def row_hash(row: Row, config: EditTableConfig, adapters: Sequence[Sequence[str]] = ()) -> str:
    """A hash of everything that decides the row's pictures; `adapters` are the hashes of the adapters' files."""
    if not is_plain(row.file):
        raise UserError(f"{str(row.file)[:200]}: no such file")
    inputs = {
        "cells": dict(row.cells), "photo": file_hash(row.file),
        "masks": [file_hash(mask) for mask in _mask_files(row, config.table) if is_plain(mask)],
        "shared": [str(getattr(config, field.name)) for field in fields(InferenceOptions) if field.name not in NEUTRAL],
        "adapters": [list(hashes) for hashes in adapters],
    }  # fmt: skip
    return sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]


def _mask_files(row: Row, table: Path) -> Iterator[Path]:
    """What the cells of masks name, boxes and words too."""
    for name in (name for name in MASKS if name in row.cells):
        for value in _values(name, row.cells[name]):
            where = _beside_the_table(name, value, table)
            yield at_home(where.partition("=")[2] if name == "region" else where)


def adapter_hashes(path: Path) -> list[str]:
    """The hashes of an adapter's files: its weights, and the settings that PEFT keeps beside them."""
    path = fetched(path)
    if path.is_dir():
        files = [file for pattern in ("*.safetensors", ADAPTER_CONFIG) for file in sorted(path.rglob(pattern))]
    elif path.name.endswith(INDEX):
        files = [path, *sorted(path.parent.glob("*.safetensors"))]
    else:
        files = [path, path.with_name(ADAPTER_CONFIG)]
    return [file_hash(file) for file in files if is_plain(file)]


def has_pictures(folder: Path) -> bool:
    """Does a row's folder hold an edit?  A user may have removed it, to have the row edited again."""
    return folder.is_dir() and any(folder.glob(f"{Path(EDITED).stem}*.png"))


class TableResult(msgspec.Struct, frozen=True):
    """What a line of results.jsonl must hold: the row's name, and the hash of its inputs."""

    name: str
    inputs: str


def finished(results: Path) -> dict[str, str]:
    """The hash of the inputs of every finished row, by name; a line that a stopped run did not finish is left out."""
    if not results.is_file():
        return {}
    lines = [line for line in read_text(results).split("\n")[:-1] if line]
    rows = [checked(parse_json(line, results), TableResult, results) for line in lines]
    return {row.name: row.inputs for row in rows}


def append(results: Path, row: Mapping[str, Any]) -> None:
    """Append a line; when this returns it is on the disk."""
    whole = read_bytes(results) if results.is_file() else b""
    with results.open("ab") as stream:
        if whole and not whole.endswith(b"\n"):
            stream.truncate(whole.rfind(b"\n") + 1)
        stream.write((json.dumps(dict(row)) + "\n").encode())
        stream.flush()
        os.fsync(stream.fileno())
