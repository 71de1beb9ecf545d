"""`personalize evaluate`: measure edited pictures by the conventions of the published benchmarks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from personalize.errors import UserError
from personalize.evaluation.benchmarks import find_result, read_benchmark, size_warning
from personalize.evaluation.metrics import ClipScore, Lpips, Structure, metrics, or_unavailable
from personalize.evaluation.report import format_table, measure_item, summarize
from personalize.io.atomic import write_file
from personalize.models.loading import default_device

if TYPE_CHECKING:
    from personalize.cli.options import EvaluateConfig


def run(config: EvaluateConfig) -> Path:
    """Measure the results that exist, print a table, and write every value to `config.output`; returns that file.

    A metric that could not be measured is named in the table with the reason.

    Raises:
        UserError: the folder is no benchmark, or there is no result at all.
    """
    name, items = read_benchmark(config.benchmark, allow_pickle=config.allow_pickle)
    device = torch.device("cpu") if config.cpu else default_device()
    columns = metrics(
        or_unavailable(lambda: Structure(config.structure_model, device)),
        or_unavailable(lambda: ClipScore(config.clip_model, device)),
        or_unavailable(lambda: Lpips(config.lpips_backbone, device)),
    )
    results = [(item, find_result(config.results, item)) for item in items]
    present = [(item, path) for item, path in results if path is not None]
    if not present:
        raise UserError(
            f"{config.results} holds no result of {name}'s {len(items)} items: the first would be "
            f"{config.results / items[0].result}.png"
        )
    rows = [measure_item(item, path, columns) for item, path in present]
    table = summarize(rows, columns)
    report = {
        "benchmark": name,
        "items": len(items),
        "measured": len(rows),
        "networks": {
            "structure": config.structure_model,
            "clip": config.clip_model,
            "lpips": str(config.lpips_backbone or ""),
        },
        "summary": table,
        "rows": rows,
    }
    write_file(config.output, json.dumps(report, indent=1, ensure_ascii=False, allow_nan=True).encode())
    if warning := size_warning(name, items):
        print(warning)
    print(f"{name}: {len(rows)} of {len(items)} results\n\n{format_table(table)}\n\nevery value in {config.output}")
    return config.output
