"""Figure D9 of the drag bench: which self-attention layers segment the object under a point best.

Measured is the AUC of the ratio map against the object's true mask, for each layer and band of timesteps.  Even scenes
choose layers, band and threshold; odd scenes measure that choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from personalize.editing.drag.attention import AttentionRows, QKVRecorder, self_attention_sites
from personalize.editing.drag.config import STRENGTHS, DragSettings
from personalize.editing.drag.mask import ratio_mask
from personalize.editing.drag.warp import attention_ratio
from personalize.embedded.scenes import render
from personalize.errors import UserError
from personalize.models.attention import attention_sites
from personalize.models.stable_diffusion import StableDiffusion
from personalize.sampling.denoise import Edit, denoise
from personalize.sampling.schedule import make_schedule
from tests.bench.attention_auc import auc, coverage, site_label
from tests.bench.contract import Task
from tests.bench.drag.measures import handle_point
from tests.bench.figure_tables import average
from tests.bench.intervals import paired_interval
from tests.bench.judge.judge import as_pixels
from tests.bench.picture_measures import iou

# bands of timesteps (from, to), and sets of layers: (places in the UNet, levels counted from the finest)
BANDS = ((0, 150), (0, 300), (150, 300), (0, 500), (300, 500), (500, 700))
LAYER_SETS = {
    "up 0": (("up",), (0,)), "up 1": (("up",), (1,)), "up 2": (("up",), (2,)), "up 0+1": (("up",), (0, 1)),
    "up 1+2": (("up",), (1, 2)), "mid": (("mid",), (0,)), "down 0": (("down",), (0,)), "down 1": (("down",), (1,)),
    "down 2": (("down",), (2,)), "down 1, up 1": (("down", "up"), (1,)),
}  # fmt: skip
THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)


@torch.no_grad()
def calibration_row(model: StableDiffusion, task: Task, settings: DragSettings) -> dict[str, Any]:
    """The row of one scene: {"sites": {layer: {band: AUC}}, "readers": {layers and band: {"auc", "iou": {τ: IoU}}}}."""
    size, factor = model.resolution, model.factor
    picture, masks = render(task.before, size)
    grid = (size // factor, size // factor)
    sites = {name: site for name, site in attention_sites(model.unet, grid).items() if not site.cross}
    reading = QKVRecorder(list(sites), "qk")
    edit = Edit(model.prompts([task.source_prompt], (size, size)), guidance_scale=1, hooks=(reading,))
    plan = make_schedule(model, settings.steps, strength=STRENGTHS["latents"], inverse=True)
    denoise(model, model.encode(as_pixels(picture[None])), edit, plan)
    x, y = handle_point(masks[0])
    cell, truth = (int(y) // factor, int(x) // factor), coverage(masks[0], *grid) > 0.5
    row: dict[str, Any] = {"sites": {}, "readers": {}}
    for band in BANDS:
        kept = {key: value for key, value in reading.kept.items() if band[0] <= key[1] <= band[1]}
        if not kept:
            continue
        for site in sites.values():
            row["sites"].setdefault(site_label(site), {})[str(band)] = _score(kept, [site], grid, cell, truth)["auc"]
        for name, (places, levels) in LAYER_SETS.items():
            if chosen := self_attention_sites(sites, places, levels):
                row["readers"][f"{name} {band}"] = _score(kept, chosen, grid, cell, truth, settings)
    return row


def _score(kept, sites, grid, cell, truth, settings: DragSettings | None = None) -> dict[str, Any]:
    names = {site.name for site in sites}
    ours = {key: value for key, value in kept.items() if key[0] in names}
    window = 3 if settings is None else settings.window
    ratio_map = attention_ratio(AttentionRows(ours, sites, grid).around(cell, window), cell, window)
    others = np.ones(grid, bool)
    others[cell] = False
    row: dict[str, Any] = {"auc": auc(ratio_map.numpy()[others], truth[others])}
    if settings is not None:
        row["iou"] = {str(value): _iou(ratio_map, cell, value, truth, settings) for value in THRESHOLDS}
    return row


def _iou(ratio_map, cell, threshold: float, truth: np.ndarray, settings: DragSettings) -> float:
    try:
        mask, _ = ratio_mask(ratio_map, cell, threshold, fewest=settings.mask_fewest, most=settings.mask_most)
    except UserError:
        return 0.0
    return iou(mask.numpy(), truth)


def best_reader(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The layers, band and threshold with the highest mean IoU on even scenes, and their figures on odd ones."""
    even, odd = rows[::2], rows[1::2]
    choices = [(name, tau) for name in even[0]["readers"] for tau in even[0]["readers"][name]["iou"]]
    name, tau = max(choices, key=lambda choice: np.mean([row["readers"][choice[0]]["iou"][choice[1]] for row in even]))
    aucs = [row["readers"][name]["auc"] for row in odd]
    ious = [row["readers"][name]["iou"][tau] for row in odd]
    return {"reader": name, "threshold": float(tau), "auc": aucs, "iou": ious}


def default_ious(rows: Sequence[dict[str, Any]], settings: DragSettings) -> list[float]:
    """IoU on odd scenes of the layers, band and threshold that `settings` name."""
    reader = next(name for name, where in LAYER_SETS.items() if where == (settings.map_places, settings.map_levels))
    name, tau = f"{reader} {settings.map_timesteps}", str(settings.mask_threshold)
    return [row["readers"][name]["iou"][tau] for row in rows[1::2]]


def calibration_figures(rows: Sequence[dict[str, Any]], settings: DragSettings) -> dict[str, Any]:
    """D9: IoU of the mask on odd scenes by the defaults and by what is best on even ones, and the paired difference."""
    best, defaults = best_reader(rows), default_ious(rows, settings)
    difference, low, high = paired_interval(defaults, best["iou"])
    chosen = f"{best['reader']}, τ {best['threshold']:g}"
    return {
        "D9 IoU of the mask, defaults": average(defaults, ""),
        f"D9 the same, {chosen}": average(best["iou"], ""),
        f"D9 AUC, {chosen}": average([value for value in best["auc"] if value is not None], ""),
        "D9 IoU, defaults above that": {"value": difference, "low": low, "high": high, "n": len(defaults), "unit": ""},
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown, on even scenes: mean AUC of every layer and band; mean AUC and best mean IoU of every set of layers."""
    even, bands = rows[::2], [str(band) for band in BANDS if str(band) in next(iter(rows[0]["sites"].values()))]
    lines = ["| layer | " + " | ".join(bands) + " |", "|---" * (len(bands) + 1) + "|"]
    for site in even[0]["sites"]:
        lines.append(
            f"| {site} | " + " | ".join(_mean([row["sites"][site][band] for row in even]) for band in bands) + " |"
        )
    lines += ["", "| reader and band | AUC | best IoU | at τ |", "|---|---|---|---|"]
    for name in even[0]["readers"]:
        ious = {tau: np.mean([row["readers"][name]["iou"][tau] for row in even]) for tau in map(str, THRESHOLDS)}
        tau = max(ious, key=lambda key: ious[key])
        lines.append(f"| {name} | {_mean([row['readers'][name]['auc'] for row in even])} | {ious[tau]:.3f} | {tau} |")
    return "\n".join(lines) + "\n"


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{np.mean(known):.3f}" if known else "–"
