"""Resumable results of a bench: one JSON line per finished cell, which is not measured again after an interruption.

A cell is the smallest unit of work, such as one arm on one scene.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def read_cells(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The stamp and the finished cells, by key, of the file `path`; an incomplete last line is left out."""
    content = path.read_bytes()
    first, *rows = map(json.loads, content[: content.rfind(b"\n") + 1].splitlines())
    return first["stamp"], {row["key"]: row for row in rows}


class Cells:
    """The finished cells in the file `path`, by key.

    stamp: what the results depend on (base model, adapter, settings).  It is the first line of the file.

    Raises:
        ValueError: the file has another stamp; results of two set-ups are never mixed.
    """

    def __init__(self, path: str | Path, stamp: dict[str, Any]) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        stamp = json.loads(json.dumps(stamp))
        self.rows: dict[str, dict[str, Any]] = {}
        if self.path.is_file() and self._cut_incomplete_line():
            known, self.rows = read_cells(self.path)
            if known != stamp:
                raise ValueError(f"{path} holds results of {known}, not of {stamp}: give another file")
        else:
            self._append({"stamp": stamp})

    def __contains__(self, key: str) -> bool:
        return key in self.rows

    def add(self, key: str, row: dict[str, Any]) -> dict[str, Any]:
        """Append the finished cell `key` and return it; it is on disk when this returns."""
        self.rows[key] = json.loads(json.dumps({"key": key, **row}))
        self._append(self.rows[key])
        return self.rows[key]

    def once(self, key: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The cell `key`, computed unless an earlier run finished it."""
        return self.rows[key] if key in self.rows else self.add(key, compute())

    def _append(self, row: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _cut_incomplete_line(self) -> int:
        """Remove an incomplete last line, left by an interrupted run, from the file; returns the bytes left."""
        text = self.path.read_bytes()
        whole = text.rfind(b"\n") + 1
        if whole < len(text):
            os.truncate(self.path, whole)
        return whole
