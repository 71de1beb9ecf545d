"""The outcomes of a catalogue's rows: the files they are kept in, the table, and what is printed."""

from __future__ import annotations

import csv
import json
import os
import time
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from personalize.io.atomic import write_file

DONE, FAILED = "done", "failed"
RESULTS = "results"  # folder of the outcomes, beside the adapters
COLUMNS = (
    "line", "name", "status", "reason", "adapter", "caption", "pictures", "updates", "loss", "reconstruction_db",
    "seconds",
)  # fmt: skip


def outcome(line: int, name: str, status: str, **more: Any) -> dict[str, Any]:
    """The outcome of a row, as it is written to the results."""
    return {"line": line, "name": name, "status": status, **more}


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


def write_table(rows: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Write the outcomes as a CSV file, in the order of the table's lines, atomically."""
    text = StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([row.get(column, "") for column in COLUMNS] for row in sorted(rows, key=lambda row: row["line"]))
    return write_file(path, text.getvalue().encode())


def print_outcome(row: Mapping[str, Any]) -> None:
    """Print one line about an outcome."""
    result = row["reason"] if row["status"] == FAILED else f"loss {row['loss']:.4f}, {row['seconds']} s"
    print(f"line {row['line']}, {row['name'] or 'no name'}: {row['status']}: {result}", flush=True)
