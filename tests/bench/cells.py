"""Resumable results of a bench: one JSON line per finished cell, which is not measured again after an interruption.

A cell is the smallest unit of work, such as one arm on one scene.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


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
        lines = self._whole_lines() if self.path.is_file() else []
        if not lines:
            self._append({"stamp": stamp})
        elif lines[0]["stamp"] != stamp:
            raise ValueError(f"{path} holds results of {lines[0]['stamp']}, not of {stamp}: give another file")
        self.rows: dict[str, dict[str, Any]] = {line["key"]: line for line in lines[1:]}

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

    def _whole_lines(self) -> list[dict[str, Any]]:
        """All complete lines; an incomplete last one, left by an interrupted run, is removed from the file."""
        text = self.path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        if len(whole) < len(text):
            os.truncate(self.path, len(whole))
        return [json.loads(line) for line in whole.splitlines()]
