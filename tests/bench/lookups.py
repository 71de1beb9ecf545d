"""Reading figures out of the folder of a finished run of a bench.

Each function here returns a lookup: from the folder of a run to a figure, its value with the two ends of its 95 %
interval and n.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from tests.bench import frontier, multi_concept
from tests.bench.cells import read_cells
from tests.bench.contract import CONTROLS
from tests.bench.figure_tables import proportion
from tests.bench.intervals import paired_interval

Figure = tuple[float, float | None, float | None, int]  # value, low and high end of the 95 % interval, n
Lookup = Callable[[Path], Figure]


def figure(name: str, factor: float = 1.0) -> Lookup:
    """The figure `name` of a figures.json that holds value, low, high and n; also below "figures"."""

    def lookup(folder: Path) -> Figure:
        content = json.loads((folder / "figures.json").read_text(encoding="utf-8"))
        found = content.get("figures", content)[name]
        low, high = (None if found[end] is None else factor * found[end] for end in ("low", "high"))
        return factor * found["value"], low, high, found["n"]

    return lookup


def cells(folder: Path) -> dict[str, dict[str, Any]]:
    """The finished cells of a run, by key."""
    return read_cells(folder / "cells.jsonl")[1]


def calibration(name: str, factor: float = 1.0) -> Lookup:
    """The paired difference of the figure `name` between two concepts learned with calibration and without."""

    def lookup(folder: Path) -> Figure:
        rows = cells(folder)
        arms = (multi_concept.CALIBRATED, multi_concept.PLAIN)
        count = sum(key.startswith(f"{multi_concept.CALIBRATED}/") for key in rows)
        values = [[factor * rows[f"{arm}/{index}"][name] for index in range(count)] for arm in arms]
        return *paired_interval(*values), count

    return lookup


def quickstart(reached: Callable[[dict[str, Any]], bool]) -> Lookup:
    """The share of the bundled scenes in %, of which `reached` is true."""

    def lookup(folder: Path) -> Figure:
        scenes = json.loads((folder / "figures.json").read_text(encoding="utf-8"))
        share = proportion(list(map(reached, scenes)))
        return share["value"], share["low"], share["high"], share["n"]

    return lookup


def edits(arm: str, other: str, name: str, factor: float = 1.0) -> Lookup:
    """The paired difference of the figure `name` between two arms of a bench of edits, over all of its edits."""

    def lookup(folder: Path) -> Figure:
        rows = [row for row in cells(folder).values() if "arm" in row]
        values = {(row["arm"], row["task"]): factor * float(row[name]) for row in rows}
        both = [task for one, task in values if one == arm and (other, task) in values]
        return *paired_interval(*([values[one, task] for task in both] for one in (arm, other))), len(both)

    return lookup


def squares(name: str, factor: float = 1.0, arm: str = "P2P + direct") -> Lookup:
    """The difference of the figure `name` between a scene's photos that are not square, their mean, and its square."""

    def lookup(folder: Path) -> Figure:
        rows = [row for row in cells(folder).values() if row.get("arm") == arm]
        figures: dict[tuple[str, bool], list[float]] = {}
        for row in rows:
            square = len(set(row["shape"].split("x"))) == 1
            figures.setdefault((row["task"], square), []).append(factor * float(row[name]))
        tasks = dict.fromkeys(row["task"] for row in rows)
        pairs = [(mean(figures[task, False]), mean(figures[task, True])) for task in tasks]
        return *paired_interval(*zip(*pairs, strict=True)), len(pairs)

    return lookup


def above_fixed(arm: str) -> Lookup:
    """How far the success of `arm` lies above what all other arms reach at its identity, alone or two in turn."""

    def lookup(folder: Path) -> Figure:
        rows = [row for row in cells(folder).values() if "arm" in row]
        return frontier.above_mixtures(rows, arm, [name for name in _arms(rows) if name != arm])

    return lookup


def on_frontier(arm: str) -> Lookup:
    """100 unless another arm of single images is at least as good in both figures and better in one; then 0."""

    def lookup(folder: Path) -> Figure:
        rows = [row for row in cells(folder).values() if "arm" in row]
        if not any(row["arm"] == arm for row in rows):
            raise ValueError(f"{folder} has no edits by {arm}")
        worse = frontier.dominated(frontier.points(rows, _arms(rows)))
        return 0.0 if arm in worse else 100.0, None, None, sum(row["arm"] == arm for row in rows)

    return lookup


def _arms(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The arms of `rows` but for the controls."""
    return [name for name in dict.fromkeys(row["arm"] for row in rows) if name not in CONTROLS]
