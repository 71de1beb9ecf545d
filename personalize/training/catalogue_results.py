"""The outcomes of a catalogue's rows: the files they are kept in, the table, and what is printed."""

from __future__ import annotations

import csv
import json
import os
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from hashlib import sha256
from io import StringIO
from itertools import count
from pathlib import Path
from typing import Any

from personalize.errors import Notice
from personalize.io.atomic import write_file
from personalize.io.json_files import finite_values, parse_json, utf8
from personalize.io.locks import Locked, folder_lock
from personalize.io.plain_files import opened, read_bytes

DONE, FAILED = "done", "failed"
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a cell begins with that spreadsheets calculate
MAX_RESULTS_BYTES = 256 * 2**20  # of one file of outcomes: some 500,000 rows
RESULTS = "results"  # folder of the outcomes, beside the adapters
COLUMNS = (
    "line", "name", "status", "reason", "adapter", "caption", "pictures", "updates", "loss", "reconstruction_db",
    "seconds",
)  # fmt: skip


def outcome(line: int, name: str, status: str, **more: Any) -> dict[str, Any]:
    """The outcome of a row, as it is written to the results."""
    return {"line": line, "name": name, "status": status, **more}


def key_of(row: Mapping[str, Any]) -> str:
    """What an outcome is known by: the adapter's name, so that rows of a table may move.

    Rows that were refused unread have no digest of what they learn; their name may be another row's or none, so that
    they are known by "line:name".
    """
    return row["name"] if "digest" in row else f"{row['line']}:{row['name']}"


def merged(parts: Iterable[Mapping[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """The latest outcome of each row, by `key_of`, out of those that several processes know."""
    rows = sorted((row for part in parts for row in part.values()), key=lambda row: row["time"])
    return {key_of(row): row for row in rows}


class Results:
    """The files of outcomes in `folder`: each process appends to its own, and reads those of all.

    process: the process in its launch, or the name of a file of its own; see `own_results`.
    """

    def __init__(self, folder: Path, process: int | str = 0) -> None:
        self.folder, self.path = folder, folder / f"process-{process}.jsonl"
        self._rows: dict[str, dict[str, Any]] = {}
        self._read: dict[Path, int] = {}  # bytes
        folder.mkdir(parents=True, exist_ok=True)
        if self.path.exists() and not (content := read_bytes(self.path, MAX_RESULTS_BYTES)).endswith(b"\n"):
            os.truncate(self.path, content.rfind(b"\n") + 1)  # a line that a killed run did not finish

    def add(self, row: Mapping[str, Any]) -> None:
        """Append one outcome; when this returns, the whole line is on the disk."""
        values = finite_values({**row, "time": round(time.time(), 3)})
        handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(handle, (json.dumps({**values, "sha256": _checksum(values)}) + "\n").encode())
            os.fsync(handle)
        finally:
            os.close(handle)

    def rows(self) -> dict[str, dict[str, Any]]:
        """The latest outcome of each row, by `key_of`; a Notice tells how many lines are damaged."""
        damaged = 0
        for path in sorted(self.folder.glob("process-*.jsonl")):
            with opened(path, MAX_RESULTS_BYTES) as stream:  # another may have put a pipe there
                stream.seek(self._read.get(path, 0))
                text = stream.read()
            lines = text[: text.rfind(b"\n") + 1].splitlines()
            self._read[path] = self._read.get(path, 0) + text.rfind(b"\n") + 1
            rows = [_parsed(line) for line in lines]
            damaged += rows.count(None)
            for row in filter(None, rows):
                key = key_of(row)
                if row["time"] >= self._rows.get(key, row)["time"]:
                    self._rows[key] = row
        if damaged:
            text = f"{damaged} line(s) of the results in {self.folder} are damaged: those rows are learned again"
            warnings.warn(text, Notice, stacklevel=2)
        return dict(self._rows)


@contextmanager
def own_results(folder: Path, process: int) -> Iterator[Results]:
    """Results with a file that no other catalogue on the same output appends to while the body runs."""
    for number in count(1):
        name = f"{process}" if number == 1 else f"{process}-{number}"
        try:
            with folder_lock(folder, f"process-{name}"):
                yield Results(folder, name)
                return
        except Locked:
            continue


@contextmanager
def claimed(folder: Path, name: str) -> Iterator[bool]:
    """Run the body with the row `name` as ours; False if another catalogue on the same output trains it now."""
    with ExitStack() as stack:
        try:
            stack.enter_context(folder_lock(folder, f"row-{sha256(name.encode()).hexdigest()[:16]}"))
        except Locked:
            yield False
            return
        yield True


def _checksum(row: Mapping[str, Any]) -> str:
    return sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()[:16]


def _parsed(line: bytes) -> dict[str, Any] | None:
    """The outcome in a line of a results file; None if it is not what was written."""
    try:
        row = parse_json(line, "a line of results")
        known = {"line", "name", "status", "time"} <= set(row)
        return row if row.pop("sha256", None) == _checksum(row) and known else None
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None


def write_table(rows: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Write the outcomes as a CSV file, in the order of the table's lines, atomically."""
    text = StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    ordered = sorted(rows, key=lambda row: row["line"])
    writer.writerows([_cell(row.get(column, "")) for column in COLUMNS] for row in ordered)
    return write_file(path, utf8(text.getvalue()))


def _cell(value: Any) -> Any:
    """`value`; text that a spreadsheet would take for a formula is quoted by an apostrophe, and stays on one line."""
    if not isinstance(value, str):
        return value
    return f"{chr(39) * value.startswith(FORMULA)}{value}".replace("\r", " ").replace("\n", " ")


def print_outcome(row: Mapping[str, Any]) -> None:
    """Print one line about an outcome."""
    result = row["reason"] if row["status"] == FAILED else f"loss {row['loss']:.4f}, {row['seconds']} s"
    print(f"line {row['line']}, {row['name'] or 'no name'}: {row['status']}: {result}", flush=True)
