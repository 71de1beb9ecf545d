"""How well point drags move objects, in scenes whose true result is known: figures D9 to D17.

    python -m tests.bench.drag                                     # everything, 50 scenes
    python -m tests.bench.drag --only calibration                  # D9: layers, bands, thresholds
    python -m tests.bench.drag --only drags --scenes 8 --arms move # a quick look
    python -m tests.bench.drag --only turns --scenes 20            # things turned by 30° and scaled by 1.4

Each finished cell is one JSON line; figures.md and figures.json are rewritten every time.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from personalize.editing.drag.config import DEFAULTS, DragSettings
from personalize.editing.drag.image import drag_picture
from personalize.embedded.scenes import random_scene, render
from personalize.models.stable_diffusion import EMBEDDED, StableDiffusion
from personalize.sampling.denoise import Edit, denoise
from personalize.sampling.schedule import make_schedule
from tests.bench.cells import Cells
from tests.bench.contract import BASE, DO_NOTHING, Task
from tests.bench.drag.calibration import calibration_figures, calibration_row, table
from tests.bench.drag.figures import ABLATED, DISTANCES, PASTE, TRUTH, ablations, distance_figures, figures, markdown
from tests.bench.drag.mean_distance import dift_features, distance_left
from tests.bench.drag.measures import (
    away_from,
    background_only,
    centroid_shift,
    disc,
    drag_task,
    find_shift,
    ghost,
    handle_point,
    mean_ratio,
    paste_object,
    seam,
    warped_shift,
)
from tests.bench.drag.textures import KNOWN, UNKNOWN, paint_texture
from tests.bench.drag.turns import TURNS, Turn, turn_figures, turn_row
from tests.bench.judge.judge import as_bytes, as_pixels
from tests.bench.picture_measures import iou, psnr, structure_distance
from tests.bench.world import weights_of, world_of

# each arm differs from `move` in one setting; "mask" and "paste" are arguments of the bench, no settings
ARMS: dict[str, dict[str, Any]] = {
    "move": {},
    "move, coarse mask": {"refine": False},
    "move, smooth fill": {"fill": "smooth"},
    "move, no pinning": {"protect": False},
    "move, true mask": {"mask": "true"},
    "move, attention fill": {"fill": "attention"},
    "move, all keys": {"fill_keys": "all"},
    "move, 50 steps": {"steps": 50},
    "deform": {"mode": "deform"},
    "deform, stretch": {"mode": "deform", "displacement": "stretch"},
    "latents": {"method": "latents"},
    "latents, raw fill": {"method": "latents", "fill": "attention_raw"},
    "latents, no kv": {"method": "latents", "kv": "off"},
    "latents, no protection": {"method": "latents", "protect": False},
}
WITH_DISTANCES = ("move", "deform")
TWIN = "twin"
REPLAYED = 0.7  # share of the schedule that the control `base` inverts and samples, as the method `latents` does


@dataclass(frozen=True)
class DragBench:
    model: Path = EMBEDDED
    """A Stable Diffusion folder; its world.json, if there, says which nouns, styles and backgrounds it knows."""
    scenes: int = 50
    """Number of scenes, the same ones for every arm."""
    budget: int = 1
    """Pictures an arm may draw for a scene; only 1, for a drag is deterministic."""
    only: tuple[str, ...] = ()
    """Parts to run: calibration, drags, distances (MD of the pictures of drags), turns; all when empty."""
    arms: tuple[str, ...] = ()
    """Arms to run; all when empty."""
    true_mask: bool = False
    """Give every arm the true mask, for models where calibration finds no layer that segments objects."""
    textured: bool = False
    """Scenes before textured backgrounds, four that the model knows and five that it does not, in turn."""
    steps: int = DEFAULTS.steps
    """Steps of the whole schedule."""
    strength: float | None = None
    """Share of the schedule that is sampled; by default what the method has."""
    output_dir: Path = Path("runs/bench/drag")
    """Where results go; finished cells found there are not measured again."""


class Bench:
    """The bench's model, settings and finished cells."""

    def __init__(self, options: DragBench, model: StableDiffusion | None = None) -> None:
        self.options, self.model = options, model or StableDiffusion.load(options.model)
        self.settings = DragSettings(steps=options.steps, strength=options.strength)
        self.world = world_of(options.model)
        settings = {"true_mask": options.true_mask, "settings": asdict(self.settings), "textured": options.textured}
        stamp = {"weights": weights_of(self.model), **self.world, **settings}
        self.cells = Cells(options.output_dir / "cells.jsonl", stamp)

    def task(self, seed: int, cells: int, *, twin: bool = False) -> Task:
        split = "bench/drag/textured" if self.options.textured else "bench/drag"
        scene = random_scene(seed, split=split, objects=1, **self.world)
        if self.options.textured:
            scene = scene.with_background((KNOWN + ("gray",) * len(UNKNOWN))[seed % (len(KNOWN) + len(UNKNOWN))])
        return drag_task(scene, seed, cells * self.model.factor / self.model.resolution, twin=twin)

    def ground(self, seed: int) -> np.ndarray | None:
        """The background of scene number `seed`, if it is none of the embedded model's own."""
        number = seed % (len(KNOWN) + len(UNKNOWN)) - len(KNOWN)
        return paint_texture(UNKNOWN[number], self.model.resolution) if self.options.textured and number >= 0 else None

    def calibration(self) -> list[dict[str, Any]]:
        rows = []
        for seed in range(self.options.scenes):
            task = self.task(seed, ABLATED)
            rows.append(
                self.cells.once(
                    f"calibration/{seed}", lambda task=task: calibration_row(self.model, task, self.settings)
                )
            )
        return rows

    def drags(self) -> list[dict[str, Any]]:
        """A row for every arm, distance and scene, controls included."""
        wanted = [DO_NOTHING, BASE, PASTE, *(self.options.arms or ARMS)]
        plan = [
            (arm, cells, False) for arm in wanted for cells in DISTANCES if cells == ABLATED or arm in WITH_DISTANCES
        ]
        plan += [("move", ABLATED, True)] if "move" in wanted else []
        rows = []
        for seed in range(self.options.scenes):
            for arm, cells, twin in plan:
                key = f"{arm}/{cells}/{TWIN + '/' if twin else ''}{seed}"
                rows.append(self.cells.once(key, lambda a=(arm, cells, twin, seed): self.row(*a)))
        return rows

    def turns(self) -> list[dict[str, Any]]:
        """A row for every turn and scene."""
        return [self.cells.once(f"turn/{turn.name}/{seed}", lambda turn=turn, seed=seed: self.turn(turn, seed))
                for seed in range(self.options.scenes) for turn in TURNS]  # fmt: skip

    def turn(self, turn: Turn, seed: int) -> dict[str, Any]:
        task = self.task(seed, DISTANCES[0])
        row, picture = turn_row(
            self.model, task.before, self.ground(seed), task.source_prompt, self.settings, turn
        )  # fmt: skip
        self.save(picture, turn.name, 0, False, seed)
        return row

    def distances(self, drags: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """MD in pixels of every finished drag, without twins, and of the truth."""
        rows = []
        for seed, cells in dict.fromkeys((row["seed"], row["cells"]) for row in drags):
            mine = [row["arm"] for row in drags if (row["seed"], row["cells"], row["twin"]) == (seed, cells, False)]
            rows += self.distances_of((TRUTH, *mine), cells, seed)
        return rows

    def distances_of(self, arms: Sequence[str], cells: int, seed: int) -> list[dict[str, Any]]:
        pair = cache(partial(self.pair, seed, cells))
        return [
            self.cells.once(f"md/{arm}/{cells}/{seed}", lambda arm=arm: self.distance(arm, cells, seed, pair()))
            for arm in arms
        ]

    def pair(self, seed: int, cells: int) -> tuple[Any, ...]:
        """The source's features, the true picture, handle, target and caption of one drag."""
        task, size, ground = self.task(seed, cells), self.model.resolution, self.ground(seed)
        (before, masks), (truth, _) = render(task.before, size, ground), render(task.after, size, ground)
        vector, handle = find_shift(truth, before, masks[0]), handle_point(masks[0])
        target = tuple(at + by for at, by in zip(handle, vector, strict=True))
        return dift_features(self.model, before, task.source_prompt), truth, handle, target, task.source_prompt

    def distance(self, arm: str, cells: int, seed: int, pair: tuple[Any, ...]) -> dict[str, Any]:
        source, truth, handle, target, caption = pair
        picture = truth if arm == TRUTH else np.asarray(Image.open(self.picture_path(arm, cells, False, seed)))
        found = dift_features(self.model, picture, caption)
        return {"arm": arm, "cells": cells, "seed": seed, "md": distance_left(source, found, handle, target)}

    def row(self, arm: str, cells: int, twin: bool, seed: int) -> dict[str, Any]:
        """The measures of one drag by `arm`, against the truth; lengths in pixels."""
        task, size, cell = self.task(seed, cells, twin=twin), self.model.resolution, self.model.factor
        ground = self.ground(seed)
        (before, masks), (truth, ends) = render(task.before, size, ground), render(task.after, size, ground)
        vector = find_shift(truth, before, masks[0])  # sprites are placed on whole pixels
        handle = handle_point(masks[0])
        target = tuple(min(size - 1.0, max(0.0, at + by)) for at, by in zip(handle, vector, strict=True))
        picture, facts = self.dragged(arm, task, before, masks[0], vector, handle, target)
        background = background_only(task.before, size, ground)
        went = find_shift(picture, before, masks[0])
        marker = find_shift(picture, before, disc(masks[0].shape, handle, 2 * cell) & masks[0])
        far = away_from([masks[0], ends[0]], cell)
        left = masks[0] & away_from([ends[0]], 1, 1)
        row = {
            "arm": arm, "cells": cells, "twin": twin, "seed": seed, "vector": vector, "went": went, "marker": marker,
            "centroid": centroid_shift(picture, before, background), "background_db": psnr(picture, truth, far),
            "ghost": ghost(picture, before, background, left, masks[0]), "seam_db": seam(picture, truth, ends[0], cell),
            "truth_db": psnr(picture, truth), "kept": 1 - structure_distance(picture, before, np.ones_like(masks[0])),
        }  # fmt: skip
        if twin:
            row["twin_went"] = find_shift(picture, before, masks[1])
        self.save(picture, arm, cells, twin, seed)
        return row | facts

    def dragged(
        self, arm: str, task: Task, before: np.ndarray, mask: np.ndarray, vector: Any, handle: Any, target: Any
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """The arm's picture, and the seconds, tracking errors and notes that `drag_picture` reports."""
        if arm == DO_NOTHING:
            return before, {}
        if arm == PASTE:
            return paste_object(before, mask, vector), {}
        if arm == BASE:
            return self.replayed(task, before), {}
        changes = dict(ARMS[arm])
        paste, true_mask = changes.pop("paste", False), changes.pop("mask", "") == "true" or self.options.true_mask
        settings = replace(self.settings, **changes)
        result = drag_picture(
            self.model, Image.fromarray(before), [handle, target], prompt=task.source_prompt, settings=settings,
            mask=Image.fromarray(mask.astype(np.uint8) * 255) if true_mask else None, paste=paste,
        )  # fmt: skip
        found = np.asarray(result.mask) > 0
        facts = {
            "seconds": result.seconds, "edit_seconds": result.edit_seconds, "arrived": result.arrived[0],
            "missed": result.missed[0], "mean_ratio": mean_ratio(result, mask), "notes": len(result.notes),
            "recall": float((found & mask).sum() / mask.sum()), "iou": iou(found, mask),
        }  # fmt: skip
        if result.preview is not None:
            facts["warped"] = warped_shift(result.preview)
        return np.asarray(result.image), facts

    @torch.no_grad()
    def replayed(self, task: Task, before: np.ndarray) -> np.ndarray:
        """The picture inverted and sampled again by the base, without a drag: the best that a drag can preserve."""
        size = (self.model.resolution,) * 2
        edit = Edit(self.model.prompts([task.source_prompt], size), guidance_scale=1)
        latents = self.model.encode(as_pixels(before[None]))
        for inverse in (True, False):
            plan = make_schedule(self.model, self.options.steps, strength=REPLAYED, inverse=inverse)
            latents = denoise(self.model, latents, edit, plan)
        return as_bytes(self.model.decode(latents).cpu())[0]

    def picture_path(self, arm: str, cells: int, twin: bool, seed: int) -> Path:
        name = f"{seed:03d}-{cells}{'-twin' if twin else ''}-{arm.replace(' ', '_').replace(',', '')}.png"
        return self.options.output_dir / "pictures" / name

    def save(self, picture: np.ndarray, arm: str, cells: int, twin: bool, seed: int) -> None:
        path = self.picture_path(arm, cells, twin, seed)
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(picture).save(path)


def run(options: DragBench, model: StableDiffusion | None = None) -> dict[str, Any]:
    """Measure the cells that are not finished, write all figures, and return them."""
    bench, started = Bench(options, model), time.monotonic()
    report: dict[str, Any] = {}
    tables: list[str] = []
    if not options.only or "calibration" in options.only:
        rows = bench.calibration()
        report |= calibration_figures(rows, bench.settings)
        tables.append(table(rows))
    rows = bench.drags() if not options.only or {"drags", "distances"} & set(options.only) else []
    if not options.only or "drags" in options.only:
        report |= figures(rows, bench.model.factor)
        tables.append(ablations(rows))
    if not options.only or "distances" in options.only:
        report |= distance_figures(bench.distances(rows))
    if not options.only or "turns" in options.only:
        report |= turn_figures(bench.turns())
    text = json.dumps(report, indent=1, ensure_ascii=False)
    (options.output_dir / "figures.json").write_text(text, encoding="utf-8")
    (options.output_dir / "figures.md").write_text("\n".join([markdown(report), *tables]), encoding="utf-8")
    print(text, f"\n{time.monotonic() - started:.0f} s")
    return report
