"""`personalize evaluate`: measure edited pictures by the conventions of the published benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from personalize.cli.commands.evaluate_run import make_results
from personalize.errors import UserError
from personalize.evaluation.benchmarks import find_result, read_benchmark, size_warning
from personalize.evaluation.metrics import (
    ClipScore,
    Lpips,
    Metric,
    Structure,
    drag_metrics,
    metrics,
    or_unavailable,
)
from personalize.evaluation.networks import Unavailable
from personalize.evaluation.point_matching import PointMatching
from personalize.evaluation.report import format_table, measure_item, summarize
from personalize.io.atomic import write_file
from personalize.io.json_files import json_bytes
from personalize.io.numbering import add_files
from personalize.io.progress import ticked
from personalize.models.loading import default_device
from personalize.models.stable_diffusion import StableDiffusion

if TYPE_CHECKING:
    from personalize.cli.options import EvaluateConfig

OUTPUT = "evaluation.json"


def run(config: EvaluateConfig) -> Path:
    """Measure the results that exist, print a table, and write every value to a JSON file; returns its path.

    With `config.run` the missing results are made first. A metric that could not be measured is named in the table
    with the reason.

    Raises:
        UserError: the folder is no benchmark, or there is no result at all, or none that can be read.
    """
    name, items = read_benchmark(config.benchmark, allow_pickle=config.allow_pickle)
    if config.run is not None:
        make_results(config, name, items)
    columns = _columns(config, name)
    results = [(item, find_result(config.results, item)) for item in items]
    present = [(item, path) for item, path in results if path is not None]
    if not present:
        raise UserError(
            f"{config.results} holds no result of {name}'s {len(items)} items: the first would be "
            f"{config.results / items[0].result}.png"
        )
    rows, unreadable = [], {}
    for item, path in ticked(present, "Measuring"):
        try:
            rows.append(measure_item(item, path, columns))
        except UserError as error:  # of a damaged picture: the others count all the same
            unreadable[item.name] = str(error)
            print(f"{item.name}: not measured: {error}")
    if not rows:
        raise UserError(f"none of the {len(present)} results of {name} can be read: see the lines above")
    table = summarize(rows, columns)
    report = {
        "benchmark": name,
        "items": len(items),
        "measured": len(rows),
        "networks": {
            "structure": config.structure_model,
            "clip": config.clip_model,
            "lpips": config.lpips_net if config.lpips_net != "squeeze" else str(config.lpips_backbone or ""),
            "points": config.point_model,
        },
        "unreadable": unreadable,
        "summary": table,
        "rows": rows,
    }
    output = _write(config.output, report)
    if warning := size_warning(name, items):
        print(warning)
    print(f"{name}: {len(rows)} of {len(items)} results\n\n{format_table(table)}\n\nevery value in {output}")
    return output


def _write(output: Path | None, report: dict[str, Any]) -> Path:
    """Write the report to `output`, or under a name here that is not taken; returns the file's path.

    An infinite value (PSNR of equal pictures) is null there, one that was not measured a text that says why.
    """
    content = json_bytes(report, ensure_ascii=False)
    if output is None:
        return Path(add_files(Path(), {OUTPUT: content})[OUTPUT])
    write_file(output, content)
    return output


def _columns(config: EvaluateConfig, benchmark: str) -> list[Metric]:
    """The table's columns, on the networks that the options name; those of drags first for DragBench."""
    device = torch.device("cpu") if config.cpu else default_device()
    perceptual = or_unavailable(lambda: Lpips(config.lpips_backbone, device, config.lpips_net))
    columns = metrics(
        or_unavailable(lambda: Structure(config.structure_model, device)),
        or_unavailable(lambda: ClipScore(config.clip_model, device)),
        perceptual,
    )
    if benchmark != "DragBench":
        return columns
    return [*drag_metrics(perceptual, or_unavailable(lambda: _point_matching(config.point_model, device))), *columns]


def _point_matching(base: str | None, device: torch.device) -> PointMatching:
    if base is None:
        raise Unavailable(
            "no base model is given: name one with --point_model, published with Stable Diffusion 2.1, or embedded"
        )
    return PointMatching(StableDiffusion.load(None if base == "embedded" else base, device=device))
