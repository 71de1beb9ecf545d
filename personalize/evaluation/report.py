"""`personalize evaluate`: measure edited pictures of a benchmark against its source pictures, prompts and masks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from personalize.evaluation.benchmarks import BenchmarkItem
from personalize.evaluation.metrics import ImagePair, Metric
from personalize.evaluation.networks import Unavailable
from personalize.io.image_files import load_image
from personalize.io.images import to_pixels

RESAMPLES = 10_000  # of the bootstrap


def measure_item(item: BenchmarkItem, result: Path, columns: Sequence[Metric]) -> dict[str, Any]:
    """One item's values by column; where a metric cannot be measured, a text that says why."""
    pair = load_pair(item, result)
    values: dict[str, float | list[float] | str] = {}
    for column in columns:
        try:
            values[column.name] = column.measure(pair)
        except Unavailable as reason:
            values[column.name] = f"not measured: {reason}"
    return {"item": item.name, "kind": item.kind, **values}


def load_pair(item: BenchmarkItem, result: Path) -> ImagePair:
    """The item's source and result, with the result and the mask resized to the source.

    A result that is a strip of panels of the source's size, as PnPInversion saves them, is cut to its last panel.
    """
    source, edited = load_image(item.source), load_image(result)
    width, height = source.size
    if edited.height == height and edited.width > width and edited.width % width == 0:
        edited = edited.crop((edited.width - width, 0, edited.width, height))
    edited = edited if edited.size == source.size else edited.resize(source.size, Image.Resampling.LANCZOS)
    mask = item.mask
    if mask is not None and tuple(mask.shape) != (height, width):
        image = Image.fromarray(mask.numpy().astype(np.uint8) * 255)
        mask = torch.from_numpy(np.array(image.resize((width, height), Image.Resampling.NEAREST)) > 127)
    return ImagePair(
        _unit_range(source), _unit_range(edited), mask, item.source_prompt, item.target_prompt, item.points
    )


def summarize(rows: Sequence[dict[str, Any]], columns: Sequence[Metric]) -> dict[str, dict[str, Any]]:
    """For each column: the mean in its unit with a 95 % interval, n pictures, and what was left out of the mean.

    Infinite values (PSNR of equal pictures) are left out and counted; the reasons for missing values are listed.  Where
    a picture has several values, the mean is over all of them, and the interval over draws of pictures.
    """
    table = {}
    for column in columns:
        values = [row[column.name] for row in rows]
        lists = [value if isinstance(value, list) else [value] for value in values if not isinstance(value, str)]
        numbers = [[value * column.factor for value in row] for row in lists]
        finite = [row for row in numbers if all(map(math.isfinite, row))]
        reasons = sorted({value for value in values if isinstance(value, str)})
        low, high = mean_interval(finite) if len(finite) > 1 else (None, None)
        table[column.name] = {
            "unit": f"×{column.factor:g}" if column.factor != 1 else "",
            "better": "↑" if column.larger_is_better else "↓",
            "mean": sum(map(sum, finite)) / sum(map(len, finite)) if finite else None, "low": low, "high": high,
            "n": len(finite), "infinite": len(numbers) - len(finite), "missing": reasons,
        }  # fmt: skip
    return table


def mean_interval(values: Sequence[float] | Sequence[Sequence[float]]) -> tuple[float, float]:
    """95 % percentile bootstrap interval (low, high) of the mean, by 10,000 resamples; (−∞, ∞) for a single value.

    Values that belong together, such as those of one picture, are given as a list, and drawn together.  The resamples
    depend on the number of values or lists alone, so that a figure is the same each time.
    """
    groups = [np.atleast_1d(np.asarray(value, np.float64)) for value in values]
    sums, sizes = np.array([group.sum() for group in groups]), np.array([len(group) for group in groups])
    if len(groups) < 2:
        return -math.inf, math.inf
    rng = np.random.default_rng(len(groups))
    draws = (rng.integers(0, len(groups), (500, len(groups))) for _ in range(RESAMPLES // 500))
    means = np.concatenate([sums[rows].sum(1) / sizes[rows].sum(1) for rows in draws])
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def format_table(table: dict[str, dict[str, Any]]) -> str:
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


def _unit_range(picture: Image.Image) -> Tensor:
    """Pixels (1, 3, H, W) in [0, 1]."""
    return (to_pixels(picture) + 1) / 2
