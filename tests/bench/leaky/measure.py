"""Is a model leaky?  Where its nouns look, and what it draws that was not asked for, before any method is run on it.

    python -m tests.bench.leaky.measure                                    # the twin of this folder
    python -m tests.bench.leaky.measure --unet personalize/embedded/model/unet   # the embedded model, for comparison

Noun maps are those of `attention_maps.py`, of scenes of two objects on their direct trajectories.  Prompts name one
object of such a scene, or both; an object is wrong if the judge sees it though the prompt does not name it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from PIL import Image

from personalize.editing.dynamic_prompt_learning.leakage import mean_noun_maps
from personalize.editing.dynamic_prompt_learning.noun_groups import noun_groups
from personalize.embedded.scenes import ANY_STYLE, Scene, noun_phrase, place_phrase, random_scene, render
from personalize.io.figures import grid
from personalize.models.image_processor import PaddedImage
from personalize.models.stable_diffusion import StableDiffusion
from personalize.sampling.denoise import Edit, sample
from personalize.sampling.inversion import invert
from personalize.sampling.schedule import make_schedule
from tests.bench.cells import Cells
from tests.bench.contract import caption
from tests.bench.intervals import mean_interval, wilson
from tests.bench.judge.judge import Judge, as_bytes
from tests.bench.leaky.train import UNET, assemble
from tests.bench.map_measures import map_measures
from tests.bench.world import weights_of, world_of

SPLIT = "bench/leaky"
BATCH = 8
ASKED = {"overlap": (">=", 0.30), "iou": ("<=", 0.45), "wrong_object": (">=", 0.15)}
PROPORTIONS = (
    "wrong_object", "named_object", "wrong_object_of_one", "both_objects", "wrong_object_of_two", "right_background",
)  # fmt: skip


@dataclass(frozen=True)
class LeakBench:
    unet: Path = UNET
    """Folder of the UNet; the other parts are the embedded model's."""
    output_dir: Path = Path("runs/bench/leaky")
    """Where results go, and where finished ones are found again."""
    scenes: int = 50
    """Scenes whose noun maps are measured."""
    inversion_steps: int = 50
    """Steps of a trajectory."""
    prompts: int = 200
    """Scenes of which one object, and both, are asked for."""
    steps: int = 15
    """Steps of a picture, with DPM-Solver++."""
    guidance_scale: float = 5.0
    """Guidance of a picture."""
    threads: int = 2
    """Processor cores to use."""


class Bench:
    """One run: the model, what it knows, the judge, and the finished cells."""

    def __init__(self, options: LeakBench, model: StableDiffusion | None = None) -> None:
        self.options = options
        folder = assemble(options.unet, options.output_dir / "pipeline")
        self.model, self.judge, self.world = model or StableDiffusion.load(folder), Judge.load(), world_of(folder)
        settings = {key: getattr(options, key) for key in ("inversion_steps", "steps", "guidance_scale")}
        stamp = {"weights": weights_of(self.model), "split": SPLIT, **settings, **self.world}
        self.cells = Cells(options.output_dir / "cells.jsonl", stamp)

    def scene(self, seed: int) -> Scene:
        """Scene number `seed`, of two objects."""
        return random_scene(seed, split=SPLIT, objects=2, **self.world)

    @torch.no_grad()
    def maps(self, seed: int) -> dict[str, Any]:
        """Overlap of the two noun maps, their IoU with the true masks, and their share off the objects."""
        scene, model, steps = self.scene(seed), self.model, self.options.inversion_steps
        picture, masks = render(scene, model.resolution)
        prompt = caption(scene)
        pixels = PaddedImage.of(model, Image.fromarray(picture)).pixels
        made = invert(model, pixels, prompt, "direct", steps=steps)
        groups = noun_groups(model, prompt, scene.words)
        return map_measures(mean_noun_maps(model, made, tuple(groups), [made.conditioning] * steps), masks)

    def picture_file(self, kind: str, seed: int) -> Path:
        """Where the picture of the prompt `one/seed` or `two/seed` is kept."""
        folder = self.options.output_dir / "pictures"
        folder.mkdir(exist_ok=True)
        return folder / f"{kind}-{seed}.png"

    @torch.no_grad()
    def pictures(self, prompts: Sequence[str], seeds: Sequence[int]) -> torch.Tensor:
        """Pictures (b, 3, H, W) of `prompts`, in [−1, 1]."""
        edit = Edit(self.model.prompts(list(prompts)), guidance_scale=self.options.guidance_scale)
        latents = sample(self.model, edit, seeds, make_schedule(self.model, self.options.steps, "dpm++_2m"))
        return self.model.decode(latents).cpu()

    def prompts(self, seeds: Sequence[int]) -> None:
        """Draw the first object, and both, of each scene, and write down what the judge sees."""
        scenes = [self.scene(seed) for seed in seeds]
        for kind, texts in (("one", [single_prompt(scene) for scene in scenes]), ("two", list(map(caption, scenes)))):
            drawn = self.pictures(texts, seeds)
            for seed, picture in zip(seeds, as_bytes(drawn), strict=True):
                Image.fromarray(picture).save(self.picture_file(kind, seed))
            for seed, scene, text, verdict in zip(seeds, scenes, texts, self.judge(drawn), strict=True):
                asked = {thing.noun for thing in scene.objects[: 1 if kind == "one" else 2]}
                row = {"prompt": text, "asked": sorted(asked), "seen": sorted(verdict.nouns)}
                row |= {"there": asked <= verdict.nouns, "wrong": bool(verdict.nouns - asked)}
                self.cells.add(f"{kind}/{seed}", row | {"background": verdict.background == scene.background})


def single_prompt(scene: Scene) -> str:
    """A caption that names the first object of `scene` alone."""
    return f"{ANY_STYLE} {noun_phrase(scene.objects[0].noun)} {place_phrase(scene.background)}"


def figures(rows: dict[str, dict[str, Any]], scenes: int, prompts: int) -> dict[str, dict[str, Any]]:
    """Each figure with its 95 % interval, n, and for those that make a model leaky what is asked and whether it is met.

    rows: cells by key; of the groups "maps", "one" and "two" the first `scenes`, `prompts` and `prompts` count.
    """
    counts = {"maps": scenes, "one": prompts, "two": prompts}
    groups = {name: [rows[f"{name}/{i}"] for i in range(n) if f"{name}/{i}" in rows] for name, n in counts.items()}
    found = {}
    for name in ("overlap", "iou", "best", "off") if groups["maps"] else ():
        values = [row[name] for row in groups["maps"]]
        found[name] = (float(np.mean(values)), *mean_interval(values), len(values))
    one, two = groups["one"], groups["two"]
    columns = (
        (one + two, "wrong"),
        (one, "there"),
        (one, "wrong"),
        (two, "there"),
        (two, "wrong"),
        (one + two, "background"),
    )
    for name, (column, key) in zip(PROPORTIONS, columns, strict=True) if one else ():
        right = sum(row[key] for row in column)
        found[name] = (right / len(column), *wilson(right, len(column)), len(column))
    return {name: judged(name, *figure) for name, figure in found.items()}


def judged(name: str, value: float, low: float, high: float, n: int) -> dict[str, Any]:
    """A figure as it is written down; `met` says whether the value is what makes a model leaky."""
    row: dict[str, Any] = {"value": round(value, 4), "low": round(low, 4), "high": round(high, 4), "n": n}
    if name in ASKED:
        relation, limit = ASKED[name]
        row |= {"asked": f"{relation} {limit}", "met": value >= limit if relation == ">=" else value <= limit}
    return row


def sheet(bench: Bench, count: int) -> None:
    """Write sheet.png: the pictures of the first `count` prompts for one object and for both, none left out."""
    scenes = [bench.scene(seed) for seed in range(count)]
    cells = [[Image.open(bench.picture_file(kind, seed)) for seed in range(count)] for kind in ("one", "two")]
    columns = [" and ".join(thing.noun for thing in scene.objects) for scene in scenes]
    title = "Asked for the first, and for both; first seeds, none left out"
    picture = grid(cells, columns=columns, labels=["the first", "both"], title=title, cell=128)
    picture.save(bench.options.output_dir / "sheet.png")


def run(options: LeakBench, model: StableDiffusion | None = None) -> dict[str, dict[str, Any]]:
    """Measure what is missing, and write figures.json and sheet.png."""
    bench = Bench(options, model)
    for seed in range(options.scenes):
        bench.cells.once(f"maps/{seed}", lambda seed=seed: bench.maps(seed))
    for start in range(0, options.prompts, BATCH):
        seeds = [seed for seed in range(start, min(start + BATCH, options.prompts)) if f"two/{seed}" not in bench.cells]
        if seeds:
            bench.prompts(seeds)
    if options.prompts:
        sheet(bench, min(options.prompts, BATCH))
    found = figures(bench.cells.rows, options.scenes, options.prompts)
    text = json.dumps(found, indent=1)
    (options.output_dir / "figures.json").write_text(text + "\n", encoding="utf-8")
    print(text)
    return found


def main(options: LeakBench) -> None:
    torch.set_num_threads(options.threads)
    run(options)


if __name__ == "__main__":
    main(tyro.cli(LeakBench, config=(tyro.conf.OmitArgPrefixes,)))
