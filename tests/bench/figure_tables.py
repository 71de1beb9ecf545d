"""The embedded model's figures from its bench's finished cells, with n and 95 % intervals, and two tables of AUCs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from tests.bench.intervals import mean_interval, wilson

NOUN_MAP_SIZE = "16×16"  # size of the cross-attention maps that the figure of noun maps is about
NOUN_BAND = ("300", "500", "700")  # and their timesteps

Row = dict[str, Any]


def figures(rows: dict[str, Row], n: int) -> dict[str, Any]:
    """Every figure of which there are cells: {name: {value, low, high, n, unit, …}}.

    rows: cells by "group/number", of which numbers below `n` count.
    """
    groups: dict[str, list[Row]] = {}
    for key, row in rows.items():
        group, number = key.rsplit("/", 1)
        if int(number) < n:
            groups.setdefault(group, []).append(row)
    result: dict[str, Any] = {}
    for group in ("autoencoder", "held_out_autoencoder"):
        result[f"{group}_psnr"] = average([row["psnr"] for row in groups.get(group, [])], "dB")
    one, two = groups.get("single", []), groups.get("pairs", [])
    result["right_object"] = proportion([row["object"] for row in one])
    result["right_background"] = proportion([row["background"] for row in one])
    result["right_object_and_no_other"] = proportion([row["exact"] for row in one])
    result["right_style_when_asked"] = proportion([row["style"] for row in one if row["style"] is not None])
    result["both_present"] = proportion([row["object"] for row in two])
    result["background_of_pairs"] = proportion([row["background"] for row in two])
    result["nouns_of_pairs"] = nouns_found(two)
    maps = groups.get("attention", [])
    result["noun_map_auc"] = best_band(table(maps, "cross"), NOUN_BAND, NOUN_MAP_SIZE, maps, "cross")
    result["self_attention_auc"] = best_cell(table(maps, "self"))
    result["cross_table"], result["self_table"] = table(maps, "cross"), table(maps, "self")
    result["inversion_below_ceiling"] = average([row["below"] for row in groups.get("inversion", [])], "dB")
    result["lost_without_a_caption"] = average(lost_without_a_caption(rows, n), "dB")
    result["seconds"] = average([row["seconds"] for row in groups.get("seconds", [])], "s")
    return {name: figure for name, figure in result.items() if figure}


def lost_without_a_caption(rows: dict[str, Row], n: int) -> list[float]:
    """By how many dB each scene comes back worse with the empty caption than with its own, where both are known."""
    pairs = ((rows.get(f"inversion/{index}"), rows.get(f"uncaptioned_inversion/{index}")) for index in range(n))
    return [captioned["psnr"] - empty["psnr"] for captioned, empty in pairs if captioned and empty]


def average(values: Sequence[float], unit: str) -> Row:
    """The mean with its bootstrap interval; empty if there are no values."""
    if not values:
        return {}
    low, high = mean_interval(values)
    bounds = {"low": low, "high": high} if math.isfinite(low) else {"low": None, "high": None}
    return {"value": float(np.mean(values)), **bounds, "n": len(values), "unit": unit}


def proportion(values: Sequence[bool]) -> Row:
    """The percentage of true values with its Wilson interval; empty if there are no values."""
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
    """How often the judge sees each noun in pictures whose prompt names it, the least frequent first."""
    seen: dict[str, list[bool]] = {}
    for row in rows:
        for noun in row["asked"]:
            seen.setdefault(noun, []).append(noun in row["seen"])
    every = {noun: proportion(values) for noun, values in seen.items()}
    return dict(sorted(every.items(), key=lambda item: (item[1]["value"], item[0])))


def table(rows: Sequence[Row], kind: str) -> dict[str, dict[str, Row]]:
    """The mean AUC of every layer and timestep, with its interval: {layer: {timestep: figure}}."""
    values: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        for layer, by_time in row[kind].items():
            for timestep, value in by_time.items():
                values.setdefault(layer, {}).setdefault(timestep, []).append(value)
    return {layer: {t: average(v, "AUC") for t, v in by_time.items()} for layer, by_time in values.items()}


def best_band(cells: dict[str, dict[str, Row]], band: Sequence[str], size: str, rows: Sequence[Row], kind: str) -> Row:
    """The layer with maps of `size` whose mean AUC over the timesteps of `band` is highest.

    Its interval is that of the scenes' means over the band.
    """
    layers = [layer for layer in cells if layer.startswith(size) and all(t in cells[layer] for t in band)]
    if not layers:
        return {}
    best = max(layers, key=lambda layer: np.mean([cells[layer][t]["value"] for t in band]))
    scenes = [row[kind][best] for row in rows if best in row[kind]]
    means = [float(np.mean([scene[t] for t in band])) for scene in scenes]
    return {**average(means, "AUC"), "layer": best, "timesteps": list(band)}


def best_cell(cells: dict[str, dict[str, Row]]) -> Row:
    """The layer and timestep with the highest mean AUC."""
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
    "lost_without_a_caption": ("what the same loses with the empty caption, dB", 2, "≤ 1", ""),
    "seconds": ("one 30-step image, s", 2, "≤ 5", "5"),
}


def markdown(report: Row) -> str:
    """The text of figures.md, from the content of figures.json."""
    options = report["options"]
    drawn = f"{options['scheduler']}, {options['steps']} steps, guidance {options['guidance_scale']:g}"
    drawn += ", bf16" if options.get("mixed_precision") == "bf16" else ""
    lines = [
        f"Pictures: {drawn}. Scenes and prompts: split `{report['split']}`, numbers 0 to n − 1.",
        "Intervals: 95 %, Wilson for percentages, bootstrap for means.",
        "",
        "| figure | target | floor | measured [95 %] | n |",
        "|---|---|---|---|---|",
        f"| nouns | 73 | 24 | {report['nouns']} | |",
    ]
    for name, (words, digits, target, floor) in LINES.items():
        if name in report["figures"]:
            figure = report["figures"][name]
            where = f" ({figure['layer']}, t {'–'.join(figure['timesteps'])})" if "layer" in figure else ""
            lines.append(f"| {words}{where} | {target} | {floor} | {format_figure(figure, digits)} | {figure['n']} |")
    if "nouns_of_pairs" in report["figures"]:
        each = (f"{noun} {figure['value']:.0f}" for noun, figure in report["figures"]["nouns_of_pairs"].items())
        lines += ["", f"Of two that were asked for, each is there, %: {', '.join(each)}."]
    for kind, title in (("cross", "The noun's cross-attention map"), ("self", "Self-attention row of a cell inside")):
        lines += auc_table(report["figures"].get(f"{kind}_table", {}), f"{title} against the true mask, AUC")
    return "\n".join(lines) + "\n"


def format_figure(figure: Row, digits: int) -> str:
    """`27.31 [26.90, 27.70]`: the value and its interval."""
    interval = "" if figure["low"] is None else f" [{figure['low']:.{digits}f}, {figure['high']:.{digits}f}]"
    return f"{figure['value']:.{digits}f}{interval}"


def auc_table(cells: dict[str, dict[str, Row]], title: str) -> list[str]:
    """The lines of a Markdown table of AUCs, layers by timesteps."""
    if not cells:
        return []
    times = sorted({t for by_time in cells.values() for t in by_time}, key=int)
    count = max(figure["n"] for by_time in cells.values() for figure in by_time.values())
    lines = ["", f"{title} (n = {count})", "", f"| layer | {' | '.join(f't {t}' for t in times)} |"]
    lines.append("|---" * (len(times) + 1) + "|")
    for layer, by_time in cells.items():
        values = [format_figure(by_time[t], 3) if t in by_time else "–" for t in times]
        lines.append(f"| {layer} | {' | '.join(values)} |")
    return lines
