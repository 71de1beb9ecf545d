"""How many samples five pictures of one subject need: edits of adapters that learned from 340, 850 and 1,700 samples.

    python -m tests.bench.several_pictures --scenes 2              # about half an hour on two idle CPU cores

Each subject is a thing in the style that the embedded model was not trained on, in five scenes of three shapes
(1:1, 2:3, 3:2), each with its own background and caption.  One run gives all adapters: with a constant learning rate
the first 340 samples are the same whatever comes later.  The subject is then put on backgrounds that it was not learned
on (bench contract, kind "background").  An edit *keeps* the subject if it succeeds and the judge sees the held-out
style, which the base model never draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from PIL import Image

from personalize.adapters.adapter import Adapter
from personalize.cli.launch import presets
from personalize.cli.parser import read_yaml
from personalize.editing.config import Sampling
from personalize.editing.editor import Editor
from personalize.embedded.scenes import HELD_OUT_STYLE, Scene, SceneObject, render, sprite_path
from personalize.formats.adapter_folders import MANIFEST
from personalize.models.stable_diffusion import EMBEDDED, StableDiffusion
from personalize.training.config import SingleImageConfig
from personalize.training.data.buckets import FittedImage, fit
from personalize.training.single_image import single_image_run
from tests.bench.cells import Cells
from tests.bench.contract import BASE, DO_NOTHING, Arm, Task, caption, do_nothing, evaluate, picture_file
from tests.bench.judge.judge import Judge
from tests.bench.report import BenchOptions, contact_sheet, share
from tests.bench.world import weights_of, world_of

WINDOWS = ((0, 0, 300, 300), (10, 0, 210, 300), (0, 80, 300, 280), (90, 0, 290, 300), (0, 20, 300, 220))
PLACES = ((0.5, 0.5), (0.35, 0.28), (0.3, 0.6), (0.66, 0.7), (0.7, 0.4))  # of the subject, within the windows


@dataclass(frozen=True)
class SeveralPicturesBench(BenchOptions):
    scenes: int = 2
    """Number of subjects, each learned from five pictures."""
    samples: tuple[int, ...] = (340, 850, 1700)
    """Samples after which an adapter is kept."""
    alone: bool = True
    """Also learn one picture alone, from the first number of samples."""
    edits: int = 4
    """New backgrounds for each subject."""
    steps: int = 20
    """Denoising steps."""
    output_dir: Path = Path("runs/several_pictures")
    """Where cells, adapters, table.md and sheet.png go; finished cells are not run again."""
    threads: int = 1
    """Processor cores to use."""


class Bench:
    """The subjects, their adapters after some numbers of samples, and their edits."""

    def __init__(self, options: SeveralPicturesBench) -> None:
        self.options, self.model = options, StableDiffusion.load(EMBEDDED, dtype=torch.float32)
        self.world, self.judge = world_of(EMBEDDED), Judge.load()
        stamp = {"weights": weights_of(self.model), "steps": options.steps, "windows": WINDOWS, "places": PLACES}
        self.cells = Cells(options.output_dir / "cells.jsonl", stamp)
        self.preset: dict[str, Any] = read_yaml(presets("single_image")["embedded"], SingleImageConfig)
        self.editor = lru_cache(maxsize=1)(self._editor)

    def scenes(self, index: int) -> list[Scene]:
        """The five scenes of subject `index`."""
        rng = np.random.default_rng([5, index])
        known = [noun for noun in self.world["nouns"] if sprite_path(noun, HELD_OUT_STYLE).is_file()]
        noun, places = str(rng.choice(known)), rng.permutation(self.world["backgrounds"])
        spots = zip(places, PLACES, strict=False)
        return [Scene(str(p), (SceneObject(noun, HELD_OUT_STYLE, x=x, y=y, size=0.5),)) for p, (x, y) in spots]

    def pictures(self, index: int) -> list[tuple[FittedImage, str]]:
        """The pictures of subject `index` with their captions, each in its own size."""
        rendered = (Image.fromarray(render(scene, 300)[0]) for scene in self.scenes(index))
        cropped = [picture.crop(box) for picture, box in zip(rendered, WINDOWS, strict=True)]
        side, multiple = self.model.resolution, 8 * self.model.factor
        return [
            (fit(one, None, side, multiple), caption(s)) for one, s in zip(cropped, self.scenes(index), strict=True)
        ]

    def tasks(self, index: int) -> list[Task]:
        """The subject on backgrounds that are not among its pictures."""
        scenes = self.scenes(index)
        new = [place for place in self.world["backgrounds"] if place not in {scene.background for scene in scenes}]
        chosen = np.random.default_rng([6, index]).permutation(new)[: self.options.edits]
        first = scenes[0]
        return [
            Task("background", f"background/several/{index}-{place}", first, first.with_background(str(place)))
            for place in chosen
        ]

    def learn(self, index: int, count: int) -> None:
        """Train on `count` pictures of the subject, and keep the adapters after the numbers of samples."""
        images, captions = zip(*self.pictures(index)[:count], strict=True)
        wanted = self.options.samples if count > 1 else self.options.samples[:1]
        config = SingleImageConfig(**{**self.preset, "max_train_samples": max(wanted)})
        marks = {samples // config.update_samples(): samples for samples in wanted}  # by the number of updates
        with single_image_run(self.model, images, captions, config) as run:
            for report in run.steps():
                if report.update in marks:
                    run.adapter().save(self.folder(index, count, marks[report.update]))

    def folder(self, index: int, count: int, samples: int) -> Path:
        return self.options.output_dir / "adapters" / f"{index}-{count}-pictures-{samples}"

    def _editor(self, index: int, count: int, samples: int) -> Editor:
        folder = self.folder(index, count, samples)
        if not (folder / MANIFEST).is_file():
            self.learn(index, count)
        return Editor(self.model, Adapter.load(folder))

    def arms(self, index: int) -> dict[str, Arm]:
        """The controls, one picture learned alone, and five pictures after each number of samples."""
        side = self.model.resolution  # as the scenes with the true results; else as the picture of the nearest caption
        sampling = Sampling(self.options.steps, "dpm++_2m", size=(side, side))

        def base(task: Task, before: np.ndarray, budget: int) -> Sequence[np.ndarray]:
            drawn = Editor(self.model).base(task.target_prompt, seeds=range(budget), sampling=sampling)
            return [np.asarray(one) for one in drawn]

        def learned(count: int, samples: int) -> Arm:
            def arm(task: Task, before: np.ndarray, budget: int) -> Sequence[np.ndarray]:
                with self.editor(index, count, samples) as editor:
                    drawn = editor.edit(task.target_prompt, seeds=range(budget), sampling=sampling)
                return [np.asarray(one) for one in drawn]

            return arm

        arms: dict[str, Arm] = {DO_NOTHING: do_nothing, BASE: base}
        if self.options.alone:
            arms[f"1 picture, {self.options.samples[0]} samples"] = learned(1, self.options.samples[0])
        return arms | {f"5 pictures, {samples} samples": learned(5, samples) for samples in self.options.samples}

    def kept(self, key: str) -> bool:
        """Does the judge see the subject's own style in the picture of a cell?"""
        with Image.open(picture_file(self.cells, key)) as picture:
            return self.judge(np.asarray(picture.convert("RGB")))[0].style == HELD_OUT_STYLE


def run(options: SeveralPicturesBench) -> str:
    """Measure the cells that are not finished, write table.md and sheet.png, and return the table."""
    bench, rows, tasks, names = Bench(options), [], [], []
    for index in range(options.scenes):
        arms = bench.arms(index)
        ours, names = bench.tasks(index), list(arms)
        for name, arm in arms.items():  # an adapter's edits one after the other: it is loaded once
            every = {DO_NOTHING: do_nothing, BASE: arms[BASE], name: arm}
            found = evaluate(ours, every, bench.cells, bench.judge, budget=options.budget, size=bench.model.resolution)
            rows += [row for row in found if row["arm"] == name]
        tasks += ours
        print(f"subject {index + 1} of {options.scenes}: {ours[0].before.objects[0].noun}", flush=True)
    rows = [row | {"kept": row["success"] and bench.kept(row["key"])} for row in rows]
    lines = ["| arm | n | success % | subject kept % |", "|---|---|---|---|"]
    for name in names:
        mine = [row for row in rows if row["arm"] == name]
        lines.append(f"| {name} | {len(mine)} | {share(mine, 'success')} | {share(mine, 'kept')} |")
    text = "\n".join(lines) + "\n"
    (options.output_dir / "table.md").write_text(text, encoding="utf-8")
    contact_sheet(tasks, names, bench.cells).save(options.output_dir / "sheet.png")
    return text


def main(options: SeveralPicturesBench) -> None:
    torch.set_num_threads(options.threads)
    print(run(options))


if __name__ == "__main__":
    main(tyro.cli(SeveralPicturesBench, config=(tyro.conf.OmitArgPrefixes,)))
