"""Measure the embedded model, or another model trained on scenes: the figures of its model card.

    python -m tests.bench.embedded_model                                  # everything, n = 500
    python -m tests.bench.embedded_model --only nouns background --n 64   # a quick look

Each finished prompt or scene is one JSON line, so that an interrupted run continues where it stopped; figures.json,
figures.md and sheet.png are rewritten every time.  Scenes and prompts are of the split "bench", on which nothing is
trained.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from PIL import Image
from torch import Tensor

from personalize.embedded.scenes import (
    ANY_STYLE,
    HELD_OUT_STYLE,
    STYLES,
    Scene,
    captions,
    noun_phrase,
    place_phrase,
    random_scene,
    render,
)
from personalize.io.figures import grid
from personalize.models.stable_diffusion import EMBEDDED, StableDiffusion
from personalize.sampling.denoise import Edit, denoise, sample
from personalize.sampling.schedule import make_schedule
from tests.bench.attention_auc import attention_aucs
from tests.bench.cells import Cells
from tests.bench.figure_tables import figures, markdown
from tests.bench.judge.judge import Judge, as_bytes, as_pixels
from tests.bench.picture_measures import psnr
from tests.bench.world import weights_of, world_of

INVERSION_STEPS = 50
TIMED_RUNS = 3
SHEET_SIDE = 8  # prompts to a row and to a column


@dataclass(frozen=True)
class EmbeddedModelBench:
    model: Path = EMBEDDED
    """A Stable Diffusion folder; its world.json, if there, says which nouns, styles and backgrounds it knows."""
    output_dir: Path = Path("runs/embedded_figures")
    """Where results go; finished cells found there are not measured again."""
    only: tuple[str, ...] = ()
    """Figures to measure; all when empty."""
    split: str = "bench"
    """Data split of the scenes and prompts; to choose settings, use another one than for the figures."""
    n: int = 500
    """Number of prompts or scenes for each figure."""
    batch: int = 16
    """How many of them are processed at a time."""
    scheduler: str = "ddim"
    """Scheduler that draws the pictures."""
    steps: int = 30
    """Steps of a picture."""
    guidance_scale: float = 5.0
    """Guidance of a picture; 1 is off."""
    nouns: tuple[str, ...] = ()
    """Nouns of the prompts, instead of those of world.json."""
    styles: tuple[str, ...] = ()
    """Styles of the prompts, instead of those of world.json."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """Precision of the UNet; "no" is fp32 on a CPU, and bf16 on a GPU that supports it."""
    threads: int = 2
    """Processor cores to use."""


class Bench:
    """The bench's model, its world, the judge, and the finished cells."""

    def __init__(self, options: EmbeddedModelBench, model: StableDiffusion | None = None) -> None:
        self.options = options
        as_saved = self.model = model or StableDiffusion.load(options.model)
        if model is None and options.mixed_precision == "bf16":  # rounded, the weights would count as others
            self.model = StableDiffusion.load(options.model, dtype=torch.bfloat16)
        self.judge = Judge.load()
        self.world = world_of(options.model, nouns=options.nouns, styles=options.styles)
        settings = {key: getattr(options, key) for key in ("scheduler", "steps", "guidance_scale", "mixed_precision")}
        stamp = {"weights": weights_of(as_saved), "split": options.split, **settings, **self.world}
        self.cells = Cells(options.output_dir / "cells.jsonl", stamp)

    def scene(self, index: int, *, objects: int | None = None, styles: Sequence[str] = ()) -> Scene:
        world = self.world | ({"styles": styles} if styles else {})
        return random_scene(index, split=self.options.split, objects=objects, **world)

    def missing(self, group: str) -> Iterator[list[int]]:
        """The numbers of the group's cells that are not finished, in batches."""
        left = [index for index in range(self.options.n) if f"{group}/{index}" not in self.cells]
        for start in range(0, len(left), self.options.batch):
            print(f"{group}: {self.options.n - len(left) + start} of {self.options.n}", flush=True)
            yield left[start : start + self.options.batch]

    def pictures(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """Pictures (b, 3, H, W) of `prompts`, sampled with the options' scheduler, steps and guidance."""
        with torch.no_grad():
            edit = Edit(self.model.prompts(list(prompts)), guidance_scale=self.options.guidance_scale)
            schedule = make_schedule(self.model, self.options.steps, self.options.scheduler)
            return self.model.decode(sample(self.model, edit, seeds, schedule)).cpu()

    def renders(self, scenes: Sequence[Scene]) -> np.ndarray:
        return np.stack([render(scene, self.model.resolution)[0] for scene in scenes])


def autoencoder(bench: Bench, group: str = "autoencoder", styles: Sequence[str] = ()) -> None:
    for batch in bench.missing(group):
        images = bench.renders([bench.scene(index, styles=styles) for index in batch])
        again = as_bytes(bench.model.decode(bench.model.encode(as_pixels(images))))
        for index, image, copy in zip(batch, images, again, strict=True):
            bench.cells.add(f"{group}/{index}", {"psnr": psnr(copy, image)})


def held_out_autoencoder(bench: Bench) -> None:
    autoencoder(bench, "held_out_autoencoder", (HELD_OUT_STYLE,))


def prompts_drawn(bench: Bench, group: str, objects: int) -> None:
    """Sample pictures of the scenes' captions, and record what the judge sees in them."""
    for batch in bench.missing(group):
        scenes = [bench.scene(index, objects=objects) for index in batch]
        texts = [prompt(scene, index) for scene, index in zip(scenes, batch, strict=True)]
        verdicts = bench.judge(bench.pictures(texts, batch))
        for index, scene, text, verdict in zip(batch, scenes, texts, verdicts, strict=True):
            asked = {thing.noun for thing in scene.objects}
            styled = text.startswith(STYLES[scene.objects[0].style])
            row = {"prompt": text, "asked": sorted(asked)}
            row |= {"seen": sorted(verdict.nouns), "seen_background": verdict.background}
            row |= {"object": asked <= verdict.nouns, "exact": asked == verdict.nouns}
            row |= {"background": verdict.background == scene.background}
            row |= {"style": verdict.style == scene.objects[0].style if styled else None}
            bench.cells.add(f"{group}/{index}", row)


def prompt(scene: Scene, index: int) -> str:
    """Caption number `index` of `scene`, modulo their number: every form of caption is used equally often."""
    texts = captions(scene)
    return texts[index % len(texts)]


def single(bench: Bench) -> None:
    prompts_drawn(bench, "single", 1)


def pairs(bench: Bench) -> None:
    prompts_drawn(bench, "pairs", 2)


def attention(bench: Bench) -> None:
    for batch in bench.missing("attention"):
        scenes = [bench.scene(index) for index in batch]
        texts = [prompt(scene, index) for scene, index in zip(scenes, batch, strict=True)]
        for index, row in zip(batch, attention_aucs(bench.model, scenes, texts, batch), strict=True):
            bench.cells.add(f"attention/{index}", row)


@torch.no_grad()
def inversion(bench: Bench, group: str = "inversion", *, captioned: bool = True) -> None:
    """DDIM inversion and replay at guidance 1, with the caption or with the empty one.

    Measured is the PSNR against the scene, and how far it is below that of the autoencoder alone.
    """
    model = bench.model
    ahead, back = (make_schedule(model, INVERSION_STEPS, inverse=inverse) for inverse in (True, False))
    for batch in bench.missing(group):
        scenes = [bench.scene(index) for index in batch]
        images = bench.renders(scenes)
        texts = [prompt(scene, index) if captioned else "" for scene, index in zip(scenes, batch, strict=True)]
        edit = Edit(model.prompts(texts), guidance_scale=1.0)
        clean = model.encode(as_pixels(images))
        replayed = denoise(model, denoise(model, clean, edit, ahead), edit, back)
        ceilings, copies = as_bytes(model.decode(clean)), as_bytes(model.decode(replayed))
        for index, image, ceiling, copy in zip(batch, images, ceilings, copies, strict=True):
            best, got = psnr(ceiling, image), psnr(copy, image)
            bench.cells.add(f"{group}/{index}", {"ceiling": best, "psnr": got, "below": best - got})


def uncaptioned_inversion(bench: Bench) -> None:
    """Inversion and replay with the empty caption, to be compared with the caption's scene by scene."""
    inversion(bench)
    inversion(bench, "uncaptioned_inversion", captioned=False)


def seconds(bench: Bench) -> None:
    """Seconds of one guided picture of 30 steps, from text to pixels, after a run that is not counted."""
    for run in range(-1, TIMED_RUNS):
        started = time.perf_counter()
        bench.pictures([captions(bench.scene(0))[0]], [0])
        taken = time.perf_counter() - started
        if run >= 0:
            about = {"threads": torch.get_num_threads(), "device": str(bench.model.device), "load": os.getloadavg()[0]}
            bench.cells.add(f"seconds/{run}", {"seconds": taken, **about})


def sheet(bench: Bench) -> None:
    """A sheet of 8×8 prompts that name no style: six nouns and two pairs of nouns, each on eight backgrounds."""
    ones, side = SHEET_SIDE - SHEET_SIDE // 4, SHEET_SIDE
    phrases = [noun_phrase(noun) for noun in spread(bench.world["nouns"], 2 * side - ones)]
    subjects = phrases[:ones] + [" and ".join(phrases[i : i + 2]) for i in range(ones, len(phrases), 2)]
    subjects = [f"{ANY_STYLE} {subject}" for subject in subjects]
    places = spread(bench.world["backgrounds"], side)
    rows = []
    for number, subject in enumerate(subjects):
        texts = [f"{subject} {place_phrase(place)}" for place in places]
        drawn = as_bytes(bench.pictures(texts, [side * number + column for column in range(side)]))
        rows.append([Image.fromarray(picture) for picture in drawn])
    settings = f"{bench.options.scheduler}, {bench.options.steps} steps, guidance {bench.options.guidance_scale:g}"
    title = f"{len(rows)} by {len(places)} prompts, first seeds, none left out: {settings}"
    picture = grid(rows, columns=[place_phrase(place) for place in places], labels=subjects, title=title, cell=128)
    picture.save(bench.options.output_dir / "sheet.png")


def spread(names: Sequence[str], count: int) -> list[str]:
    """`count` of `names` at even distances."""
    return [names[index * len(names) // count] for index in range(count)]


FIGURES: dict[str, Callable[[Bench], None]] = {
    "autoencoder": autoencoder,
    "held_out_autoencoder": held_out_autoencoder,
    "nouns": single,
    "background": single,
    "pairs": pairs,
    "cross_attention": attention,
    "self_attention": attention,
    "inversion": inversion,
    "uncaptioned_inversion": uncaptioned_inversion,
    "seconds": seconds,
    "sheet": sheet,
}


def run(options: EmbeddedModelBench, model: StableDiffusion | None = None) -> dict[str, Any]:
    """Measure the cells that are not finished, write the figures, and return the content of figures.json."""
    unknown = set(options.only) - set(FIGURES)
    if unknown:
        raise ValueError(f"unknown figures {sorted(unknown)}: choose among {', '.join(FIGURES)}")
    bench = Bench(options, model)
    for measure in dict.fromkeys(FIGURES[name] for name in options.only or FIGURES):
        measure(bench)
    report = {"nouns": len(bench.world["nouns"]), "model": str(options.model)}
    report |= {"options": _as_json(options), "split": options.split}
    report["figures"] = figures(bench.cells.rows, options.n)
    (options.output_dir / "figures.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (options.output_dir / "figures.md").write_text(markdown(report), encoding="utf-8")
    return report


def _as_json(options: EmbeddedModelBench) -> dict[str, Any]:
    return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(options).items()}


def main(options: EmbeddedModelBench) -> None:
    torch.set_num_threads(options.threads)
    print(markdown(run(options)))


if __name__ == "__main__":
    main(tyro.cli(EmbeddedModelBench))
