"""Figures D10 to D17 of the drag bench with their intervals, and the table of ablations, from its finished cells."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from tests.bench.contract import BASE
from tests.bench.figure_tables import average, format_figure, proportion
from tests.bench.intervals import paired_interval

PASTE, TRUTH = "naive paste", "truth"
DISTANCES = (2, 4, 8)  # of the drags, in latent cells
ABLATED = 4  # latent cells: the distance at which the ablations are compared


def figures(rows: Sequence[dict[str, Any]], cell: int) -> dict[str, Any]:
    """Figures D10 to D17: {name: {value, low, high, n, unit, wanted}}; a latent cell is `cell` pixels wide."""
    groups: dict[tuple[str, int, bool], dict[int, dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["arm"], row["cells"], row["twin"]), {})[row["seed"]] = row
    table: dict[str, Any] = {}

    def put(name: str, figure: dict[str, Any], wanted: str = "") -> None:
        if figure:
            table[name] = figure | {"wanted": wanted}

    for cells in DISTANCES:
        moves = list(groups.get(("move", cells, False), {}).values())
        share = proportion([arrived(row, cell) for row in moves])
        put(f"D10 moved by {cells} cells within tolerance", share, "≥ 80 %")
        deforms = list(groups.get(("deform", cells, False), {}).values())
        shares = [_length(row["marker"]) / _length(row["vector"]) for row in deforms]
        put(f"D11 handle's share of the way, {cells} cells", average(shares, ""), "≥ 0.6")
        centroids = proportion([_centroid_as_predicted(row) for row in deforms])
        put(f"D11 centroid as the mean ratio says, {cells} cells", centroids, "high")
        warps = proportion([_centroid_as_warped(row) for row in deforms if row.get("warped")])
        put(f"D11 centroid as the warp says, {cells} cells", warps, "high")
    usual, base = groups.get(("move", ABLATED, False), {}), groups.get((BASE, ABLATED, False), {})
    paste = groups.get((PASTE, ABLATED, False), {})
    put("D12 background below the replay's", average(_paired(base, usual, "background_db"), "dB"), "≤ 0.5 dB")
    put("D13 ghost", average([row["ghost"] for row in usual.values()], ""), "≤ 0.08")
    for name, wanted in (("recall", "≥ 0.97"), ("iou", "≥ 0.8")):
        put(f"mask {name}", average([row[name] for row in usual.values() if name in row], ""), wanted)
    put("D13 ghost of at most 15 %", proportion([row["ghost"] <= 0.15 for row in usual.values()]), "high")
    twins = list(groups.get(("move", ABLATED, True), {}).values())
    put("D14 ghost beside a twin", average([row["ghost"] for row in twins], ""), "≤ 0.08")
    put("D14 twin stays within a cell", proportion([_length(row["twin_went"]) <= cell for row in twins]), "≥ 90 %")
    left = [math.dist(row["marker"], row["vector"]) / _length(row["vector"]) for row in usual.values()]
    put("D15 distance left, share of the way", average(left, ""), "≤ 0.5 (doing nothing: 1)")
    put("D15 seam above naive paste's", average(_paired(usual, paste, "seam_db"), "dB"), "> 0")
    edit_share = average([row["edit_seconds"] / row["seconds"] for row in usual.values()], "")
    put("D17 latent edit, share of the time", edit_share, "≤ 0.1")
    put("seconds a drag", average([row["seconds"] for row in usual.values()], "s"))
    return table


def markdown(figures: dict[str, dict[str, Any]]) -> str:
    """The Markdown table of `figures`, with what is wanted of those of which something is."""
    rows = ["| figure | measured [95 %] | n | wanted |", "|---|---|---|---|"]
    for name, figure in figures.items():
        text = format_figure(figure, 1 if figure["unit"] == "%" else 3) + f" {figure['unit']}".rstrip()
        rows.append(f"| {name} | {text} | {figure['n']} | {figure.get('wanted', '')} |")
    return "\n".join(rows) + "\n"


def distance_figures(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """MD in pixels of every arm and distance; that of the truth is what the features themselves miss."""
    groups: dict[str, list[float]] = {}
    for row in rows:
        groups.setdefault(f"MD {row['arm']}, {row['cells']} cells", []).append(row["md"])
    return {name: average(values, "px") for name, values in groups.items()}


def ablations(rows: Sequence[dict[str, Any]]) -> str:
    """Figure D16 in Markdown: every arm at one distance, and its paired difference from `move` with a 95 % interval."""
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


def arrived(row: dict[str, Any], cell: int) -> bool:
    """D10: the distance is right within the larger of 1 latent cell and 15 %, the direction within 10°."""
    asked, moved = _length(row["vector"]), _length(row["went"])
    if moved == 0:
        return False
    cosine = sum(a * b for a, b in zip(row["vector"], row["went"], strict=True)) / (asked * moved)
    return abs(moved - asked) <= max(cell, 0.15 * asked) and cosine >= math.cos(math.radians(10))


def _centroid_as_predicted(row: dict[str, Any]) -> bool:
    """D11: the centroid moved along the drag d by (mean ratio) · d, within ±25 %, and strictly between 0 and d."""
    return _moved_by(row, row["mean_ratio"] * _length(row["vector"]))


def _centroid_as_warped(row: dict[str, Any]) -> bool:
    """The same with the way of the centroid of the area that the warp covers, in place of (mean ratio) · d."""
    return _moved_by(row, _along(row["warped"], row))


def _moved_by(row: dict[str, Any], way: float) -> bool:
    along = _along(row["centroid"], row)
    return 0 < along < _length(row["vector"]) and abs(along - way) <= 0.25 * way


def _along(vector: Sequence[float], row: dict[str, Any]) -> float:
    """How far `vector` goes along the drag."""
    return sum(a * b for a, b in zip(row["vector"], vector, strict=True)) / _length(row["vector"])


def _paired(these: dict[int, Any], those: dict[int, Any], name: str) -> list[float]:
    """Differences of the figure `name` between rows of the same seed."""
    return [these[seed][name] - those[seed][name] for seed in these if seed in those]


def _length(vector: Sequence[float]) -> float:
    return math.hypot(*vector)
