"""Reports of benches: a table of the figures with intervals, and a contact sheet of the pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from personalize.embedded.scenes import render
from personalize.io.figures import grid
from tests.bench.cells import Cells
from tests.bench.contract import BASE, KINDS, Task, picture_file
from tests.bench.intervals import mean_interval, paired_interval, wilson

ALIKE = 0.7  # cosine: 95 % of pairs of one thing are above 0.82, 95 % of pairs of two things below 0.60


@dataclass(frozen=True)
class BenchOptions:
    """The options of every bench; a bench inherits them and adds its own."""

    scenes: int = 50
    """Number of scenes for each kind of edit."""
    budget: int = 1
    """Pictures that every arm may draw for one scene, of which the same selector keeps one."""
    output_dir: Path = Path("runs/bench")
    """Where cells, table and contact sheet go; finished cells found there are not run again."""


def table(rows: Sequence[dict[str, Any]], *, reference: str = BASE) -> str:
    """A Markdown table with a line for each kind of edit and arm, and a 95 % interval for each figure.

    Percentages have Wilson intervals, means have bootstrap intervals.  "alike" is the share of rows whose likeness is
    at least `ALIKE`, among those that have one.  The last column is the paired difference in success from the arm
    `reference` on the same tasks, in percentage points.
    """
    lines = [
        "| edit | arm | n | success % | scene % | alike % | PSNR dB | colour ΔE | structure | success − reference |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for kind in KINDS:
        ours = [row for row in rows if row["kind"] == kind]
        for arm in dict.fromkeys(row["arm"] for row in ours):
            mine = [row for row in ours if row["arm"] == arm]
            cells = [share(mine, "success"), share(mine, "whole_scene"), _alike(mine)]
            cells += [mean(mine, key, digits) for key, digits in (("psnr", 1), ("colour", 2), ("structure", 3))]
            theirs = {row["task"]: row for row in ours if row["arm"] == reference}
            lines.append(f"| {kind} | {arm} | {len(mine)} | {' | '.join(cells)} | {_difference(mine, theirs)} |")
    return "\n".join(lines) + "\n"


def _alike(rows: Sequence[dict[str, Any]]) -> str:
    """The share of the rows with a likeness whose subject is still the same thing."""
    known = [{"alike": row["likeness"] >= ALIKE} for row in rows if row["likeness"] is not None]
    return share(known, "alike") if known else "–"


def share(rows: Sequence[dict[str, Any]], key: str) -> str:
    """`84.0 [78.2, 88.5]`: the percentage of rows whose `key` is true, with its Wilson interval."""
    hits = sum(bool(row[key]) for row in rows)
    low, high = wilson(hits, len(rows))
    return f"{100 * hits / max(1, len(rows)):.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def mean(rows: Sequence[dict[str, Any]], key: str, digits: int) -> str:
    """`27.31 [26.90, 27.70]`: the mean of `key` with its bootstrap interval, which a single row does not have."""
    values = [float(row[key]) for row in rows]
    low, high = mean_interval(values)
    interval = f" [{low:.{digits}f}, {high:.{digits}f}]" if math.isfinite(low) else ""
    return f"{np.mean(values):.{digits}f}{interval}"


def _difference(rows: Sequence[dict[str, Any]], reference: dict[str, dict[str, Any]]) -> str:
    pairs = [(row["success"], reference[row["task"]]["success"]) for row in rows if row["task"] in reference]
    if len(pairs) < 2:
        return "–"
    difference, low, high = (100 * value for value in paired_interval(*zip(*pairs, strict=True)))
    return f"{difference:+.1f} [{low:+.1f}, {high:+.1f}]"


def contact_sheet(tasks: Sequence[Task], arms: Sequence[str], cells: Cells, *, size: int = 128) -> Image.Image:
    """A sheet with a row for each task: the picture before, the true result, then each arm's picture."""
    rows, labels = [], []
    for task in tasks:
        pictures: list[Image.Image | None] = [Image.fromarray(render(s, size)[0]) for s in (task.before, task.after)]
        files = [picture_file(cells, f"{arm}/{task.name}") for arm in arms]
        rows.append(pictures + [Image.open(file) if file.is_file() else None for file in files])
        labels.append(task.target_prompt)
    return grid(rows, columns=("before", "truth", *arms), labels=labels, cell=size)
