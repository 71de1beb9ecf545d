"""The embedded model's figures from its finished cells: one line each with n and 95 % interval, and two AUC tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from tests.bench.intervals import mean_interval, wilson

STAGE = "16×16"  # maps that count for the noun's figure
NOUN_BAND = ("300", "500", "700")

Row = dict[str, Any]


def figures(rows: dict[str, Row], n: int) -> dict[str, Any]:
    """Every figure that has cells among the first `n` of its group: {name: {value, low, high, n, unit, …}}."""
    groups: dict[str, list[Row]] = {}
    for key, row in rows.items():
        group, number = key.rsplit("/", 1)
        if int(number) < n:
            groups.setdefault(group, []).append(row)
    found: dict[str, Any] = {}
    for group in ("autoencoder", "held_out_autoencoder"):
        found[f"{group}_psnr"] = average([row["psnr"] for row in groups.get(group, [])], "dB")
    one, two = groups.get("single", []), groups.get("pairs", [])
    found["right_object"] = proportion([row["object"] for row in one])
    found["right_background"] = proportion([row["background"] for row in one])
    found["right_object_and_no_other"] = proportion([row["exact"] for row in one])
    found["right_style_when_asked"] = proportion([row["style"] for row in one if row["style"] is not None])
    found["both_present"] = proportion([row["object"] for row in two])
    found["background_of_pairs"] = proportion([row["background"] for row in two])
    found["nouns_of_pairs"] = nouns_found(two)
    maps = groups.get("attention", [])
    found["noun_map_auc"] = best_band(table(maps, "cross"), NOUN_BAND, STAGE, maps, "cross")
    found["self_attention_auc"] = best_cell(table(maps, "self"))
    found["cross_table"], found["self_table"] = table(maps, "cross"), table(maps, "self")
    found["inversion_below_ceiling"] = average([row["below"] for row in groups.get("inversion", [])], "dB")
    found["seconds"] = average([row["seconds"] for row in groups.get("seconds", [])], "s")
    return {name: figure for name, figure in found.items() if figure}


def average(values: Sequence[float], unit: str) -> Row:
    """Mean with its bootstrap interval; empty when there is nothing."""
    if not values:
        return {}
    low, high = mean_interval(values)
    bounds = {"low": low, "high": high} if math.isfinite(low) else {"low": None, "high": None}
    return {"value": float(np.mean(values)), **bounds, "n": len(values), "unit": unit}


def proportion(values: Sequence[bool]) -> Row:
    """Percentage with its Wilson interval; empty when there is nothing."""
    if not values:
        return {}
    low, high = wilson(sum(values), len(values))
    return {
        "value": 100 * sum(values) / len(values),
        "low": 100 * low,
        "high": 100 * high,
        "n": len(values),
        "unit": "%",
    }


def nouns_found(rows: Sequence[Row]) -> dict[str, Row]:
    """How often each noun is there where it was asked for, the rarest first."""
    seen: dict[str, list[bool]] = {}
    for row in rows:
        for noun in row["asked"]:
            seen.setdefault(noun, []).append(noun in row["seen"])
    every = {noun: proportion(values) for noun, values in seen.items()}
    return dict(sorted(every.items(), key=lambda item: (item[1]["value"], item[0])))


def table(rows: Sequence[Row], kind: str) -> dict[str, dict[str, Row]]:
    """Mean AUC with interval of every layer and timestep: {layer: {timestep: figure}}."""
    values: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        for layer, by_time in row[kind].items():
            for timestep, value in by_time.items():
                values.setdefault(layer, {}).setdefault(timestep, []).append(value)
    return {layer: {t: average(v, "AUC") for t, v in by_time.items()} for layer, by_time in values.items()}


def best_band(cells: dict[str, dict[str, Row]], band: Sequence[str], stage: str, rows: Sequence[Row], kind: str) -> Row:
    """The layer of `stage` whose mean over the timesteps of `band` is highest, that mean taken scene by scene."""
    layers = [layer for layer in cells if layer.startswith(stage) and all(t in cells[layer] for t in band)]
    if not layers:
        return {}
    best = max(layers, key=lambda layer: np.mean([cells[layer][t]["value"] for t in band]))
    scenes = [row[kind][best] for row in rows if best in row[kind]]
    means = [float(np.mean([scene[t] for t in band])) for scene in scenes]
    return {**average(means, "AUC"), "layer": best, "timesteps": list(band)}


def best_cell(cells: dict[str, dict[str, Row]]) -> Row:
    """The layer and timestep with the highest mean."""
    every = [(figure["value"], layer, t) for layer, by_time in cells.items() for t, figure in by_time.items()]
    if not every:
        return {}
    _, layer, timestep = max(every)
    return {**cells[layer][timestep], "layer": layer, "timesteps": [timestep]}


LINES = {  # figure: (words, digits, target, floor)
    "autoencoder_psnr": ("autoencoder PSNR on held-out scenes, dB", 2, "≥ 30", "26"),
    "held_out_autoencoder_psnr": ("the same in the held-out style, dB", 2, "", ""),
    "right_object": ("single-object prompts: right object, %", 1, "≥ 90", "70"),
    "right_background": ("single-object prompts: right background, %", 1, "≥ 90", "80"),
    "right_object_and_no_other": ("single-object prompts: right object and no other, %", 1, "", ""),
    "right_style_when_asked": ("single-object prompts that ask for a style: right style, %", 1, "", ""),
    "both_present": ("two-object prompts: both present, %", 1, "≥ 75", "45"),
    "background_of_pairs": ("two-object prompts: right background, %", 1, "", ""),
    "noun_map_auc": ("noun's 16×16 cross-attention map, t 300–700, best layer, AUC", 3, "≥ 0.90", "0.80"),
    "self_attention_auc": ("self-attention row inside an object, best layer and timestep, AUC", 3, "≥ 0.85", "0.75"),
    "inversion_below_ceiling": ("DDIM inversion and replay, 50 steps, dB below the autoencoder", 2, "≤ 3", "5"),
    "seconds": ("one 30-step image, s", 2, "≤ 5", "5"),
}


def markdown(found: Row) -> str:
    """figures.md from figures.json's content."""
    options = found["options"]
    drawn = f"{options['scheduler']}, {options['steps']} steps, guidance {options['guidance_scale']:g}"
    drawn += ", bf16" if options.get("mixed_precision") == "bf16" else ""
    lines = [
        f"Pictures: {drawn}. Scenes and prompts: split `{found['split']}`, numbers 0 to n − 1.",
        "Intervals: 95 %, Wilson for percentages, bootstrap for means.",
        "",
        "| figure | target | floor | measured [95 %] | n |",
        "|---|---|---|---|---|",
        f"| nouns | 73 | 24 | {found['nouns']} | |",
    ]
    for name, (words, digits, target, floor) in LINES.items():
        if name in found["figures"]:
            figure = found["figures"][name]
            where = f" ({figure['layer']}, t {'–'.join(figure['timesteps'])})" if "layer" in figure else ""
            lines.append(f"| {words}{where} | {target} | {floor} | {shown(figure, digits)} | {figure['n']} |")
    if "nouns_of_pairs" in found["figures"]:
        each = (f"{noun} {figure['value']:.0f}" for noun, figure in found["figures"]["nouns_of_pairs"].items())
        lines += ["", f"Of two that were asked for, each is there, %: {', '.join(each)}."]
    for kind, title in (("cross", "The noun's cross-attention map"), ("self", "Self-attention row of a cell inside")):
        lines += auc_table(found["figures"].get(f"{kind}_table", {}), f"{title} against the true mask, AUC")
    return "\n".join(lines) + "\n"


def shown(figure: Row, digits: int) -> str:
    interval = "" if figure["low"] is None else f" [{figure['low']:.{digits}f}, {figure['high']:.{digits}f}]"
    return f"{figure['value']:.{digits}f}{interval}"


def auc_table(cells: dict[str, dict[str, Row]], title: str) -> list[str]:
    if not cells:
        return []
    times = sorted({t for by_time in cells.values() for t in by_time}, key=int)
    count = max(figure["n"] for by_time in cells.values() for figure in by_time.values())
    lines = ["", f"{title} (n = {count})", "", f"| layer | {' | '.join(f't {t}' for t in times)} |"]
    lines.append("|---" * (len(times) + 1) + "|")
    for layer, by_time in cells.items():
        values = [shown(by_time[t], 3) if t in by_time else "–" for t in times]
        lines.append(f"| {layer} | {' | '.join(values)} |")
    return lines
