"""How well photos are edited by text: every method on scenes whose true edited scene is known.

    python -m tests.bench.real_image_editing                                    # 50 scenes, every arm
    python -m tests.bench.real_image_editing --scenes 6 --arms "P2P + null-text"  # costly arms, fewer scenes
    python -m tests.bench.real_image_editing --scenes 2 --steps 10 --output_dir runs/quick

One JSON line per finished cell; table.md and sheet.png are written anew each time.  Measured for each
edit: success and fidelity as the contract has them (background PSNR is against the true scene, outside the masks of the
object before and after); the source row against the autoencoder's round trip, which is what any method can keep at
best; predictions of one row by the UNet, a backward pass counted as two; seconds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from PIL import Image

from personalize.calibrated import guidance, settings_for
from personalize.controls import ControlSettings
from personalize.dynamic_prompts import DynamicSettings
from personalize.editor import Editor, Sampling
from personalize.inversion import METHODS
from personalize.localization import NounRegions
from personalize.model import EMBEDDED, StableDiffusion
from personalize.null_text import NullTextSettings
from personalize.photo import EditRequest, PhotoSettings, edit_photo
from personalize.scenes import render
from personalize.uniform import UniformSettings
from tests.bench.cells import Cells
from tests.bench.contract import BASE, DO_NOTHING, Task, picture_file, psnr, random_task, score
from tests.bench.intervals import paired_interval
from tests.bench.judge import Judge, as_bytes, as_pixels
from tests.bench.report import BenchOptions, contact_sheet, mean, share
from tests.bench.world import weights_of, world_of

REFERENCE = "P2P + ddim"
SPLIT = "bench/photo"


@dataclass(frozen=True)
class Made:
    """An arm's picture, and what it kept of the photo itself, both RGB uint8 (H, W, 3)."""

    picture: np.ndarray
    source: np.ndarray


Maker = Callable[["Bench", Task, Image.Image], Made]


def edited(inversion: str, *, dpl: bool = False, **choice: Any) -> Maker:
    """An edit after one of the inversions; `choice` are fields of PhotoSettings.  Dynamic nouns are the scene's own."""

    def make(bench: Bench, task: Task, photo: Image.Image) -> Made:
        options = bench.options
        control = ControlSettings(
            cross_replace_steps=options.cross_replace_steps, self_replace_steps=options.self_replace_steps
        )
        settings = PhotoSettings(
            inversion, options.steps, guidance_scale=bench.guidance(inversion), control=control,
            null_text=NullTextSettings(rate=options.null_text_rate),
            dynamic=settings_for(DynamicSettings, bench.model.name) if dpl else None, **choice,
        )  # fmt: skip
        things = NounRegions([thing.noun.replace("_", " ") for thing in task.before.objects])
        request = EditRequest(task.target_prompt, regions=things)
        found = edit_photo(bench.model, photo, task.source_prompt, request, settings)
        return Made(np.asarray(found.image), np.asarray(found.reconstruction))

    return make


def do_nothing(bench: Bench, task: Task, photo: Image.Image) -> Made:
    return Made(np.asarray(photo), np.asarray(photo))


def base(bench: Bench, task: Task, photo: Image.Image) -> Made:
    """The target prompt drawn from noise: what a photo's edit must beat in fidelity."""
    sampling = Sampling(bench.options.steps, guidance_scale=bench.options.guidance_scale)
    drawn = np.asarray(Editor(bench.model).base(task.target_prompt, sampling=sampling)[0])
    return Made(drawn, drawn)


ARMS: dict[str, Maker] = {  # the rows of the table; another method is another row
    DO_NOTHING: do_nothing,
    BASE: base,
    **{f"P2P + {method}": edited(method) for method in METHODS},
    **{f"P2P + DPL + {method}": edited(method, dpl=True) for method in ("direct", "null-text")},
    **{f"mutual + {method}": edited(method, controller="mutual") for method in ("ddim", "direct")},
    **{f"UAM + P2P + {method}": edited(method, uniform=UniformSettings()) for method in ("ddim", "direct")},
    **{
        f"UAM + mutual + {method}": edited(method, controller="mutual", uniform=UniformSettings(blend_source=True))
        for method in ("ddim", "direct")
    },
    **{
        f"UAM, {mode} + P2P + direct": edited("direct", uniform=UniformSettings(auxiliary=mode))
        for mode in ("stored", "z0")
    },
}


@dataclass(frozen=True)
class PhotoBench(BenchOptions):
    model: Path = EMBEDDED
    """A Stable Diffusion folder; its world.json, if there, says which nouns, styles and backgrounds it knows."""
    kinds: tuple[str, ...] = ("object",)
    """Kinds of edit: object, background, style."""
    objects: int = 1
    """Objects in a scene; with two, one is edited and the other must stay."""
    arms: tuple[str, ...] = ()
    """Arms to run beside the controls; all when empty."""
    steps: int = 50
    """Denoising steps."""
    guidance_scale: float | None = None
    """Guidance of the edit; by default what suits the model, or else each method's own."""
    cross_replace_steps: float = 0.8
    """Share of the steps with the source's text maps."""
    self_replace_steps: float = 0.5
    """Share of the steps with the source's self-attention."""
    null_text_rate: float = 0.1
    """Learning rate of null-text: what the embedded model needs; 0.01 on Stable Diffusion."""
    output_dir: Path = Path("runs/bench/real_image_editing")
    """Where results go, and where finished ones are found again."""


class Bench:
    """One run: model, scenes, judge and finished cells."""

    def __init__(self, options: PhotoBench, model: StableDiffusion | None = None) -> None:
        self.options, self.model, self.judge = options, model or StableDiffusion.load(options.model), Judge.load()
        self.world = world_of(options.model)
        names = ("objects", "steps", "guidance_scale", "cross_replace_steps", "self_replace_steps", "null_text_rate")
        settings = {name: getattr(options, name) for name in names}
        settings |= {"guidance": [self.guidance(method) for method in METHODS]}
        settings |= {"dynamic": asdict(settings_for(DynamicSettings, self.model.name))}
        stamp = {"weights": weights_of(self.model), **self.world, **settings}
        self.cells = Cells(options.output_dir / "cells.jsonl", stamp)
        wanted = [DO_NOTHING, BASE, *(options.arms or ARMS)]
        if unknown := [arm for arm in wanted if arm not in ARMS]:
            raise SystemExit(f"unknown arms {unknown}: choose from {list(ARMS)}")
        self.arms = list(dict.fromkeys(wanted))

    def guidance(self, inversion: str) -> float:
        given = self.options.guidance_scale
        return guidance(self.model.name, inversion) if given is None else given

    def tasks(self) -> list[Task]:
        world = {**self.world, "new_styles": self.world["styles"], "split": SPLIT, "objects": self.options.objects}
        return [random_task(kind, seed, **world) for kind in self.options.kinds for seed in range(self.options.scenes)]

    def row(self, arm: str, task: Task) -> dict[str, Any]:
        """What `arm` made of `task`, measured."""
        before = render(task.before, self.model.resolution)[0]
        began = time.perf_counter()
        with counted(self.model) as units:
            made = ARMS[arm](self, task, Image.fromarray(before))
        seconds = time.perf_counter() - began
        file = picture_file(self.cells, f"{arm}/{task.name}")
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(made.picture).save(file)
        trip = as_bytes(self.model.decode(self.model.encode(as_pixels(before).to(self.model.device))))[0]
        about = {"arm": arm, "kind": task.kind, "task": task.name, "units": sum(units), "seconds": seconds}
        return about | {"source_db": psnr(made.source, trip)} | asdict(score(task, made.picture, self.judge))


@contextmanager
def counted(model: StableDiffusion) -> Iterator[list[int]]:
    """Predictions of one row that the body asks of the UNet, each with gradient counted three times.

    Counted where they begin: one that is cut off behind the maps it was wanted for counts whole.
    """
    found: list[int] = []

    def count(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        found.append(len(given[0]) * (3 if any(value.requires_grad for value in given) else 1))

    handle = model.unet.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: a line for each kind of edit and arm, with 95 % intervals; differences are paired."""
    lines = [
        f"| edit | arm | n | success % | background dB | − {REFERENCE} | structure | source dB | UNet rows | s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for kind in dict.fromkeys(row["kind"] for row in rows):
        ours = [row for row in rows if row["kind"] == kind]
        reference = {row["task"]: row["psnr"] for row in ours if row["arm"] == REFERENCE}
        for arm in dict.fromkeys(row["arm"] for row in ours):
            mine = [row for row in ours if row["arm"] == arm]
            pairs = [(row["psnr"], reference[row["task"]]) for row in mine if row["task"] in reference]
            figures = [
                share(mine, "success"), mean(mine, "psnr", 1), difference(pairs), mean(mine, "structure", 3),
                mean(mine, "source_db", 1), f"{np.mean([row['units'] for row in mine]):.0f}",
                f"{np.mean([row['seconds'] for row in mine]):.1f}",
            ]  # fmt: skip
            lines.append(f"| {kind} | {arm} | {len(mine)} | {' | '.join(figures)} |")
    return "\n".join(lines) + "\n"


def difference(pairs: Sequence[tuple[float, float]]) -> str:
    if len(pairs) < 2:
        return "–"
    value, low, high = paired_interval(*zip(*pairs, strict=True))
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]" if math.isfinite(low) else f"{value:+.1f}"


def run(options: PhotoBench, model: StableDiffusion | None = None) -> str:
    """Measure what is missing and write everything that is known."""
    bench = Bench(options, model)
    tasks, rows = bench.tasks(), []
    for task in tasks:
        for arm in bench.arms:
            rows.append(bench.cells.once(f"{arm}/{task.name}", lambda arm=arm, task=task: bench.row(arm, task)))
    text = table(rows)
    (options.output_dir / "table.md").write_text(text, encoding="utf-8")
    contact_sheet(tasks[:8], bench.arms, bench.cells).save(options.output_dir / "sheet.png")
    print(text)
    return text


if __name__ == "__main__":
    run(tyro.cli(PhotoBench, config=(tyro.conf.OmitArgPrefixes,)))
