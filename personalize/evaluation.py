"""`personalize evaluate`: edited pictures of a benchmark measured against its photos, prompts and masks."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from personalize.benchmarks import Item, find_result, read_benchmark, shortfall
from personalize.errors import UserError
from personalize.files import write_file
from personalize.images import load_image, to_pixels
from personalize.metrics import ClipScore, Lpips, Metric, Missing, Pair, Structure, loaded, metrics
from personalize.model import default_device

if TYPE_CHECKING:
    from personalize.commands import EvaluateConfig

RESAMPLES = 10_000


def run(config: EvaluateConfig) -> Path:
    """Measure what is there, print the table, write every value, and say what was not measured and why."""
    name, items = read_benchmark(config.benchmark, allow_pickle=config.allow_pickle)
    device = torch.device("cpu") if config.cpu else default_device()
    columns = metrics(
        loaded(lambda: Structure(config.structure_model, device)),
        loaded(lambda: ClipScore(config.clip_model, device)),
        loaded(lambda: Lpips(config.lpips_backbone, device)),
    )
    pairs = [(item, find_result(config.results, item)) for item in items]
    there = [(item, path) for item, path in pairs if path is not None]
    if not there:
        raise UserError(
            f"{config.results} holds no result of {name}'s {len(items)} items: the first would be "
            f"{config.results / items[0].result}.png"
        )
    rows = [measured(item, path, columns) for item, path in there]
    table = summary(rows, columns)
    about = {
        "benchmark": name,
        "items": len(items),
        "measured": len(rows),
        "networks": {
            "structure": config.structure_model,
            "clip": config.clip_model,
            "lpips": str(config.lpips_backbone or ""),
        },
    }
    found = {**about, "summary": table, "rows": rows}
    write_file(config.output, json.dumps(found, indent=1, ensure_ascii=False, allow_nan=True).encode())
    if lacking := shortfall(name, items):
        print(lacking)
    print(f"{name}: {len(rows)} of {len(items)} results\n\n{written(table)}\n\nevery value in {config.output}")
    return config.output


def measured(item: Item, result: Path, columns: Sequence[Metric]) -> dict[str, Any]:
    """One item's values by column; a text where there is none, saying why."""
    pair = pair_of(item, result)
    values: dict[str, float | str] = {}
    for column in columns:
        try:
            values[column.name] = column.measure(pair)
        except Missing as reason:
            values[column.name] = f"not measured: {reason}"
    return {"item": item.name, "kind": item.kind, **values}


def pair_of(item: Item, result: Path) -> Pair:
    """The item's pictures at the photo's size.  Of a strip of panels, as PnPInversion saves them, the last is taken."""
    source, edited = load_image(item.source), load_image(result)
    width, height = source.size
    if edited.height == height and edited.width > width and edited.width % width == 0:
        edited = edited.crop((edited.width - width, 0, edited.width, height))
    edited = edited if edited.size == source.size else edited.resize(source.size, Image.Resampling.LANCZOS)
    mask = item.mask
    if mask is not None and tuple(mask.shape) != (height, width):
        drawn = Image.fromarray(mask.numpy().astype(np.uint8) * 255)
        mask = torch.from_numpy(np.array(drawn.resize((width, height), Image.Resampling.NEAREST)) > 127)
    return Pair(_unit(source), _unit(edited), mask, item.source_prompt, item.target_prompt)


def summary(rows: Sequence[dict[str, Any]], columns: Sequence[Metric]) -> dict[str, dict[str, Any]]:
    """For each column: mean in its unit, 95 % interval, n, how many were infinite, and why values are missing."""
    found = {}
    for column in columns:
        values = [row[column.name] for row in rows]
        numbers = [value * column.factor for value in values if isinstance(value, float)]
        finite = [value for value in numbers if math.isfinite(value)]
        reasons = sorted({value for value in values if isinstance(value, str)})
        low, high = mean_interval(finite) if len(finite) > 1 else (None, None)
        found[column.name] = {
            "unit": f"×{column.factor:g}" if column.factor != 1 else "", "better": "↑" if column.larger else "↓",
            "mean": sum(finite) / len(finite) if finite else None, "low": low, "high": high, "n": len(finite),
            "infinite": len(numbers) - len(finite), "missing": reasons,
        }  # fmt: skip
    return found


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean: 10,000 resamples, always the same ones for the same n.

    Infinite on both sides for fewer than two values.
    """
    data = np.asarray(values, np.float64)
    if len(data) < 2:
        return -math.inf, math.inf
    rng = np.random.default_rng(len(data))
    draws = (rng.integers(0, len(data), (500, len(data))) for _ in range(RESAMPLES // 500))
    means = np.concatenate([data[rows].mean(1) for rows in draws])
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def written(table: dict[str, dict[str, Any]]) -> str:
    """The table as text: one line for each metric, its mean or the reason why there is none."""
    lines = []
    for name, one in table.items():
        head = f"{name} {one['unit']} {one['better']}".replace("  ", " ")
        reasons = "; ".join(one["missing"])
        if one["mean"] is None and not one["infinite"]:
            lines.append(f"{head:26} {reasons}")
            continue
        mean = "equal pictures" if one["mean"] is None else f"{one['mean']:.2f}"
        spread = "" if one["low"] is None else f" [{one['low']:.2f}, {one['high']:.2f}]"
        equal = f", {one['infinite']} infinite left out" if one["infinite"] else ""
        lines.append(f"{head:26} {mean}{spread}  n = {one['n']}{equal}{'; ' + reasons if reasons else ''}")
    return "\n".join(lines)


def _unit(picture: Image.Image) -> Tensor:
    return (to_pixels(picture) + 1) / 2
