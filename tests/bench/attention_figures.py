"""The figures of the bench of noun maps and uniform maps: values, intervals, targets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from tests.bench.intervals import mean_interval, paired_interval, wilson

PARTS = ("maps", "reconstruction", "masks", "auxiliaries", "swaps")
AUXILIARIES: tuple[Literal["stored", "z0"], ...] = ("stored", "z0")  # beside "u", which the part masks has
TARGETS = {  # figure: (target, whether the value or the interval's lower end must reach it)
    "iou gain, direct": (0.0, "low"), "iou gain, null-text": (0.0, "low"),
    "U9 gain over the caption": (0.0, "low"), "U9 win rate": (0.65, "value"), "U9 gain over w = 7.5": (3.0, "value"),
    "U9 steadier steps": (0.60, "value"), "U10 background gain": (0.5, "value"), "U10 change kept": (0.90, "value"),
    "swaps, other gain": (1.0, "value"),
    "U11 coverage": (0.80, "value"), "U11 iou": (0.40, "value"), "U12 background": (30.0, "value"),
}  # fmt: skip

Figure = tuple[float, float, float, int]  # value, interval's low and high end, n


def figures(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Every figure of which there are rows: value, 95 % interval, n, target ("asked"), and whether it is met."""
    parts = {part: [row for row in rows if row["part"] == part] for part in PARTS}
    values = _map_figures(parts["maps"]) | (_edit_figures(parts["masks"]) if parts["masks"] else {})
    values |= _auxiliary_figures(parts["auxiliaries"], {row["seed"]: row for row in parts["masks"]})
    values |= _swap_figures(parts["swaps"]) if parts["swaps"] else {}
    for steps in sorted({row["steps"] for row in parts["reconstruction"]}):
        values |= _reconstruction_figures([row for row in parts["reconstruction"] if row["steps"] == steps], steps)
    return {name: compare_with_target(name, *figure) for name, figure in values.items()}


def _map_figures(rows: Sequence[dict[str, Any]]) -> dict[str, Figure]:
    """The gains of dynamic prompts in the noun maps, and what they cost."""
    values = {"guessed background": _mean([row["background"] for row in rows])} if rows else {}
    for name in ("direct", "null-text"):
        if pairs := [(row[name], row["plain"]) for row in rows if name in row]:
            values[f"units, {name}"] = _mean([float(fitted["units"]) for fitted, _ in pairs])
            for key in ("iou", "best", "overlap", "off"):
                values[f"{key} gain, {name}"] = _gain(*zip(*((a[key], b[key]) for a, b in pairs), strict=True))
    return values


def _reconstruction_figures(rows: Sequence[dict[str, Any]], steps: int) -> dict[str, Figure]:
    """U9, with one number of steps: gains of uniform maps in PSNR, and how often they win."""
    db = {name: [row[name]["db"] for row in rows] for name in ("uniform", "caption", "guided", "null")}
    wins, n = sum(a > b for a, b in zip(db["uniform"], db["caption"], strict=True)), len(rows)
    return {
        f"U9 gain over the caption, {steps} steps": _gain(db["uniform"], db["caption"]),
        f"gain over the empty prompt, {steps} steps": _gain(db["uniform"], db["null"]),
        f"U9 gain over w = 7.5, {steps} steps": _gain(db["uniform"], db["guided"]),
        f"U9 win rate, {steps} steps": (wins / n, *wilson(wins, n), n),
        f"U9 steadier steps, {steps} steps": _mean([row["steadier"] for row in rows]),
    }


def _edit_figures(rows: Sequence[dict[str, Any]]) -> dict[str, Figure]:
    """U10 to U12: what uniform maps keep of the background and of the edit, and the estimated region."""
    gain = _gain([row["uniform_db"] for row in rows], [row["plain_db"] for row in rows])
    kept = [row["change"]["uniform"] / row["change"]["plain"] for row in rows]
    values = {"U10 background gain": gain, "U10 change kept": _mean(kept)}
    for name, key in (("U11 coverage", "coverage"), ("U11 iou", "iou"), ("U12 background", "background_db")):
        if known := [row[key] for row in rows if row[key] is not None]:
            values[name] = _mean(known)
    return values


def _auxiliary_figures(rows: Sequence[dict[str, Any]], masks: dict[int, dict[str, Any]]) -> dict[str, Figure]:
    """U14: the same with the other auxiliary reconstructions, against the edit without uniform maps and with "u"."""
    values: dict[str, Figure] = {}
    pairs = [(row, masks[row["seed"]]) for row in rows if row["seed"] in masks]
    for name in AUXILIARIES if pairs else ():
        ours = [row[name]["db"] for row, _ in pairs]
        values[f"U14 background gain, {name}"] = _gain(ours, [other["plain_db"] for _, other in pairs])
        values[f"U14 background above u, {name}"] = _gain(ours, [other["uniform_db"] for _, other in pairs])
        values[f"U14 change kept, {name}"] = _mean([row[name]["change"] / o["change"]["plain"] for row, o in pairs])
    return values


def _swap_figures(rows: Sequence[dict[str, Any]]) -> dict[str, Figure]:
    """What dynamic prompts keep of the object that an edit leaves and of the background; how often it comes true."""
    values = {}
    for key in ("other", "background"):
        gains = _gain(*([row[arm][f"{key}_db"] for row in rows] for arm in ("dynamic", "plain")))
        values[f"swaps, {key} gain"] = gains
    for arm in ("plain", "dynamic"):
        swapped = sum(row[arm]["swapped"] for row in rows)
        values[f"swapped, {arm}"] = (swapped / len(rows), *wilson(swapped, len(rows)), len(rows))
    pairs = ([float(row[arm]["swapped"]) for row in rows] for arm in ("dynamic", "plain"))
    values["swapped, difference"] = _gain(*pairs)
    return values


def _mean(values: Sequence[float]) -> Figure:
    return float(np.mean(values)), *mean_interval(values), len(values)


def _gain(values: Sequence[float], others: Sequence[float]) -> Figure:
    return *paired_interval(values, others), len(values)


def compare_with_target(name: str, value: float, low: float, high: float, n: int) -> dict[str, Any]:
    """The figure `name` as it is written: rounded, with its target and whether that is met (None if there is none)."""
    target, of = TARGETS.get(name) or TARGETS.get(name.partition(", ")[0]) or (None, "value")
    finite = [None if not math.isfinite(end) else round(end, 4) for end in (low, high)]
    met = None if target is None else bool(low > target if of == "low" else value >= target)
    return {"value": round(value, 4), "low": finite[0], "high": finite[1], "n": n, "asked": target, "met": met}
