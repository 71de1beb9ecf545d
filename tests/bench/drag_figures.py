"""D10 to D17 from the finished cells of the bench of drags: figures with intervals, and the table of ablations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from tests.bench.contract import BASE
from tests.bench.figure_tables import average, proportion
from tests.bench.intervals import paired_interval

PASTE = "naive paste"
DISTANCES = (2, 4, 8)  # latent cells
ABLATED = 4  # cells: the distance of the ablations


def figures(rows: Sequence[dict[str, Any]], cell: int) -> dict[str, Any]:
    """D10 to D17: {name: {value, low, high, n, unit, wanted}}; lengths in pixels, `cell` of them a latent cell."""
    by: dict[tuple[str, int, bool], dict[int, dict[str, Any]]] = {}
    for row in rows:
        by.setdefault((row["arm"], row["cells"], row["twin"]), {})[row["seed"]] = row
    found: dict[str, Any] = {}

    def put(name: str, figure: dict[str, Any], wanted: str = "") -> None:
        if figure:
            found[name] = figure | {"wanted": wanted}

    for cells in DISTANCES:
        ours = list(by.get(("move", cells, False), {}).values())
        put(f"D10 moved by {cells} cells within tolerance", proportion([_arrived(row, cell) for row in ours]), "≥ 80 %")
        soft = list(by.get(("deform", cells, False), {}).values())
        marker = [_length(row["marker"]) / _length(row["vector"]) for row in soft]
        put(f"D11 handle's share of the way, {cells} cells", average(marker, ""), "≥ 0.6")
        put(f"D11 centroid as the mean ratio says, {cells} cells", proportion([_soft(row) for row in soft]), "high")
    usual, base = by.get(("move", ABLATED, False), {}), by.get((BASE, ABLATED, False), {})
    put("D12 background below the replay's", average(_paired(base, usual, "background_db"), "dB"), "≤ 0.5 dB")
    put("D13 ghost of at most 15 %", proportion([row["ghost"] <= 0.15 for row in usual.values()]), "high")
    twins = by.get(("move", ABLATED, True), {}).values()
    put("D14 twin stays within a cell", proportion([_length(row["twin_went"]) <= cell for row in twins]), "≥ 90 %")
    far = [math.dist(row["marker"], row["vector"]) / _length(row["vector"]) for row in usual.values()]
    put("D15 distance left, share of the way", average(far, ""), "≤ 0.5 (doing nothing: 1)")
    put(
        "D15 seam above naive paste's",
        average(_paired(usual, by.get((PASTE, ABLATED, False), {}), "seam_db"), "dB"),
        "> 0",
    )
    put(
        "D17 latent edit, share of the time",
        average([r["edit_seconds"] / r["seconds"] for r in usual.values()], ""),
        "≤ 0.1",
    )
    put("seconds a drag", average([row["seconds"] for row in usual.values()], "s"))
    return found


def ablations(rows: Sequence[dict[str, Any]]) -> str:
    """D16, markdown: every arm at one distance, and its paired difference from `move` with the 95 % interval."""
    names = ("background_db", "ghost", "seam_db", "truth_db", "kept")
    lines = ["| arm | n | distance left px | " + " | ".join(names) + " |", "|---" * (len(names) + 3) + "|"]
    ours = [row for row in rows if row["cells"] == ABLATED and not row["twin"]]
    usual = {row["seed"]: row for row in ours if row["arm"] == "move"}
    for arm in dict.fromkeys(row["arm"] for row in ours):
        mine = {row["seed"]: row for row in ours if row["arm"] == arm}
        left = np.mean([math.dist(row["marker"], row["vector"]) for row in mine.values()])
        cells = [_cell(mine, usual, name) for name in names]
        lines.append(f"| {arm} | {len(mine)} | {left:.1f} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(mine: dict[int, Any], usual: dict[int, Any], name: str) -> str:
    text = f"{np.mean([row[name] for row in mine.values()]):.3f}"
    pairs = [(mine[seed][name], usual[seed][name]) for seed in mine if seed in usual]
    if len(pairs) < 2 or mine is usual:
        return text
    difference, low, high = paired_interval(*zip(*pairs, strict=True))
    return f"{text} ({difference:+.3f} [{low:+.3f}, {high:+.3f}])"


def _arrived(row: dict[str, Any], cell: int) -> bool:
    """D10: the length right to max(1 cell, 15 %), the direction to 10°."""
    way, went = _length(row["vector"]), _length(row["went"])
    if went == 0:
        return False
    cosine = sum(a * b for a, b in zip(row["vector"], row["went"], strict=True)) / (way * went)
    return abs(went - way) <= max(cell, 0.15 * way) and cosine >= math.cos(math.radians(10))


def _soft(row: dict[str, Any]) -> bool:
    """D11: the centroid along the drag within ±25 % of (mean ratio) · d, strictly between 0 and d."""
    way = _length(row["vector"])
    along = sum(a * b for a, b in zip(row["vector"], row["centroid"], strict=True)) / way
    return 0 < along < way and abs(along - row["mean_ratio"] * way) <= 0.25 * row["mean_ratio"] * way


def _paired(these: dict[int, Any], those: dict[int, Any], name: str) -> list[float]:
    return [these[seed][name] - those[seed][name] for seed in these if seed in those]


def _length(vector: Sequence[float]) -> float:
    return math.hypot(*vector)
