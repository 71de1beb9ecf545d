"""How well photos are edited by text: every method on scenes whose true result is known.

    python -m tests.bench.real_image_editing                                    # 50 scenes, every arm
    python -m tests.bench.real_image_editing --scenes 6 --arms "P2P + null-text"  # costly arms, fewer scenes
    python -m tests.bench.real_image_editing --scenes 2 --steps 10 --output_dir runs/quick

Each finished cell is one JSON line; table.md and sheet.png are rewritten every time.  Measured for each edit are
success and identity as `contract` defines them (background PSNR is against the true scene, outside the object's masks
before and after); the PSNR of the reconstructed source against the autoencoder's round trip, which is the best that any
method can reach; the number of rows that the UNet predicts, where a backward pass counts as two; and seconds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from PIL import Image

from personalize.editing.config import ControlSettings, DynamicSettings, Sampling, UniformSettings
from personalize.editing.defaults import guidance, settings_for
from personalize.editing.dynamic_prompt_learning.leakage import NounRegions
from personalize.editing.editor import Editor
from personalize.editing.photo_settings import PhotoSettings
from personalize.editing.real_image import edit_photo
from personalize.editing.real_image_settings import EditRequest
from personalize.embedded.frames import Shape, middle_band, parse_shape, render_window
from personalize.models.image_processor import PaddedImage
from personalize.models.stable_diffusion import EMBEDDED, StableDiffusion
from personalize.sampling.config import NullTextSettings
from personalize.sampling.inversion import METHODS
from tests.bench.cells import Cells
from tests.bench.contract import BASE, DO_NOTHING, Task, picture_file, random_task
from tests.bench.intervals import paired_interval
from tests.bench.judge.judge import Judge
from tests.bench.picture_measures import psnr
from tests.bench.report import BenchOptions, contact_sheet, mean, share
from tests.bench.shapes import in_window, score_window, window_of
from tests.bench.world import weights_of, world_of

REFERENCE = "P2P + ddim"
SPLIT = "bench/photo"


@dataclass(frozen=True)
class EditOutput:
    """An arm's edited picture and its reconstruction of the source, both RGB uint8 (H, W, 3)."""

    picture: np.ndarray
    source: np.ndarray


EditFunction = Callable[["Bench", Task, Image.Image], EditOutput]


def edit_arm(
    inversion: str, *, dpl: bool = False, local: bool = False, steps: int | None = None, **choice: Any
) -> EditFunction:
    """The arm that edits after the named inversion, with Prompt-to-Prompt unless `choice` says otherwise.

    dpl: fit dynamic prompts for the scene's own nouns.  local: only where the swapped nouns attend.  steps: by default
    the bench's.  choice: further fields of PhotoSettings.
    """

    def make(bench: Bench, task: Task, photo: Image.Image) -> EditOutput:
        options = bench.options
        control = ControlSettings(
            cross_replace_steps=options.cross_replace_steps, self_replace_steps=options.self_replace_steps
        )
        settings = PhotoSettings(
            inversion, steps or options.steps, guidance_scale=bench.guidance(inversion), control=control,
            null_text=NullTextSettings(rate=options.null_text_rate),
            dynamic=settings_for(DynamicSettings, bench.model.name) if dpl else None, **choice,
        )  # fmt: skip
        swapped = task.swapped_words if local else []
        request = EditRequest(task.target_prompt, local=swapped, regions=NounRegions(task.before.words))
        result = edit_photo(bench.model, photo, task.source_prompt, request, settings)
        return EditOutput(np.asarray(result.image), np.asarray(result.reconstruction))

    return make


def do_nothing(bench: Bench, task: Task, photo: Image.Image) -> EditOutput:
    return EditOutput(np.asarray(photo), np.asarray(photo))


def base(bench: Bench, task: Task, photo: Image.Image) -> EditOutput:
    """A picture of the target prompt sampled from noise: the identity that an edit of the photo must exceed."""
    sampling = Sampling(bench.options.steps, guidance_scale=bench.options.guidance_scale)
    drawn = np.asarray(Editor(bench.model).base(task.target_prompt, sampling=sampling)[0])
    return EditOutput(drawn, drawn)


ARMS: dict[str, EditFunction] = {  # the arms by name; the place to add a method
    DO_NOTHING: do_nothing,
    BASE: base,
    **{f"P2P + {method}": edit_arm(method) for method in METHODS if method != "none"},
    "P2P + direct, local": edit_arm("direct", local=True),
    **{f"P2P + none, {steps} steps": edit_arm("none", steps=steps) for steps in (8, 12)},
    "mutual + none, 12 steps": edit_arm("none", steps=12, controller="mutual"),
    **{f"P2P + DPL + {method}": edit_arm(method, dpl=True) for method in ("direct", "null-text")},
    **{f"mutual + {method}": edit_arm(method, controller="mutual") for method in ("ddim", "direct")},
    **{f"UAM + P2P + {method}": edit_arm(method, uniform=UniformSettings()) for method in ("ddim", "direct")},
    **{
        f"UAM + mutual + {method}": edit_arm(method, controller="mutual", uniform=UniformSettings(blend_source=True))
        for method in ("ddim", "direct")
    },
    **{
        f"UAM, {mode} + P2P + direct": edit_arm("direct", uniform=UniformSettings(auxiliary=mode))
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
    """Objects in a scene; of two, one is edited and the other must stay."""
    shapes: tuple[str, ...] = ()
    """Sizes of the photos, such as 160x120; by default the model's own square. The base is drawn for that alone."""
    windows: bool = False
    """Photos, square ones too, are windows at any place of larger scenes; most squares the model has learned are whole
    scenes, with bricks and horizons at one place alone."""
    arms: tuple[str, ...] = ()
    """Arms to run in addition to the controls; all when empty."""
    steps: int = 50
    """Denoising steps."""
    guidance_scale: float | None = None
    """Guidance scale of the edit; by default the model's own for each inversion."""
    cross_replace_steps: float = 0.8
    """Share of the steps with the source's cross-attention maps."""
    self_replace_steps: float = 0.5
    """Share of the steps with the source's self-attention maps."""
    null_text_rate: float = 0.1
    """Learning rate of null-text inversion; 0.1 suits the embedded model, 0.01 Stable Diffusion."""
    output_dir: Path = Path("runs/bench/real_image_editing")
    """Where results go; finished cells found there are not measured again."""


class Bench:
    """The bench's model, judge, settings and finished cells."""

    def __init__(self, options: PhotoBench, model: StableDiffusion | None = None) -> None:
        self.options, self.model, self.judge = options, model or StableDiffusion.load(options.model), Judge.load()
        self.world = world_of(options.model)
        names = ("objects", "windows", "steps", "cross_replace_steps", "self_replace_steps", "null_text_rate")
        settings = {name: getattr(options, name) for name in names}
        settings |= {"guidance": [self.guidance(method) for method in METHODS]}
        settings |= {"dynamic": asdict(settings_for(DynamicSettings, self.model.name))}
        stamp = {"weights": weights_of(self.model), **self.world, **settings}
        self.cells = Cells(options.output_dir / "cells.jsonl", stamp)
        wanted = [DO_NOTHING, BASE, *(options.arms or ARMS)]
        if unknown := [arm for arm in wanted if arm not in ARMS]:
            raise SystemExit(f"unknown arms {unknown}: choose from {list(ARMS)}")
        self.arms = list(dict.fromkeys(wanted))
        self.square = (self.model.resolution,) * 2
        self.shapes = [parse_shape(text) for text in options.shapes] or [self.square]

    def guidance(self, inversion: str) -> float:
        given = self.options.guidance_scale
        return guidance(self.model.name, inversion) if given is None else given

    def tasks(self) -> list[Task]:
        world = {**self.world, "new_styles": self.world["styles"], "split": SPLIT, "objects": self.options.objects}
        return [random_task(kind, seed, **world) for kind in self.options.kinds for seed in range(self.options.scenes)]

    def key(self, arm: str, task: Task, shape: Shape) -> str:
        """The name of a cell: without the shape for the model's own square."""
        return f"{arm}/{task.name}{'' if shape == self.square else f'/{shape[0]}x{shape[1]}'}"

    def row(self, arm: str, task: Task, shape: Shape) -> dict[str, Any]:
        """The row of one cell: `arm` run on `task` with a photo of `shape`, and measured."""
        window = window_of(task, shape) if self.options.windows else middle_band(shape)
        task = in_window(task, window)
        before = render_window(task.before, window)[0]
        started = time.perf_counter()
        with counted_unet_rows(self.model) as units:
            output = ARMS[arm](self, task, Image.fromarray(before))
        seconds = time.perf_counter() - started
        file = picture_file(self.cells, self.key(arm, task, shape))
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(output.picture).save(file)
        frame = PaddedImage.of(self.model, Image.fromarray(before), enlarge=True)
        round_trip = np.asarray(frame.to_picture(self.model.decode(self.model.encode(frame.pixels))))
        head = {"arm": arm, "kind": task.kind, "task": task.name, "shape": f"{shape[0]}x{shape[1]}"}
        head |= {"units": sum(units), "seconds": seconds, "source_db": psnr(output.source, round_trip)}
        return head | asdict(score_window(task, output.picture, window, self.judge))


@contextmanager
def counted_unet_rows(model: StableDiffusion) -> Iterator[list[int]]:
    """Count the rows that the UNet predicts in the body; one entry for each call, rows with a gradient counted thrice.

    A call counts when it begins, also if a hook then stops it before the UNet's end.
    """
    counts: list[int] = []

    def count(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        counts.append(len(tensors[0]) * (3 if any(value.requires_grad for value in tensors) else 1))

    handle = model.unet.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield counts
    finally:
        handle.remove()


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table with a line for each kind of edit and arm, with 95 % intervals; differences are paired."""
    shapes = list(dict.fromkeys(row.get("shape", "") for row in rows))
    if len(shapes) > 1:
        parts = [[row for row in rows if row["shape"] == shape] for shape in shapes]
        return "\n".join(f"{shape}\n\n{table(part)}" for shape, part in zip(shapes, parts, strict=True))
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
    """`+1.2 [+0.8, +1.6]`: the mean paired difference with its interval; `–` for fewer than two pairs."""
    if len(pairs) < 2:
        return "–"
    value, low, high = paired_interval(*zip(*pairs, strict=True))
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]" if math.isfinite(low) else f"{value:+.1f}"


def run(options: PhotoBench, model: StableDiffusion | None = None) -> str:
    """Measure the cells that are not finished, write table.md and sheet.png, and return the table."""
    bench = Bench(options, model)
    tasks, rows = bench.tasks(), []
    for task, shape, arm in product(tasks, bench.shapes, bench.arms):
        if arm != BASE or shape == bench.square:
            key = bench.key(arm, task, shape)
            rows.append(bench.cells.once(key, lambda cell=(arm, task, shape): bench.row(*cell)))
    text = table(rows)
    (options.output_dir / "table.md").write_text(text, encoding="utf-8")
    contact_sheet(tasks[:8], bench.arms, bench.cells).save(options.output_dir / "sheet.png")
    print(text)
    return text


if __name__ == "__main__":
    run(tyro.cli(PhotoBench, config=(tyro.conf.OmitArgPrefixes,)))
