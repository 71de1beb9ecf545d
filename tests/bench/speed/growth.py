"""The part of the speed bench about growth: cost over samples, pixels, rank, concepts, catalogue rows; with a plot."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from personalize.adapters.subjects import Subject
from personalize.embedded import samples
from personalize.training.catalogue import Catalogue, learn_row
from personalize.training.catalogue_table import Item, RowSources
from personalize.training.config import MultiConceptConfig, SingleImageConfig
from personalize.training.data.concepts import ConceptPicture
from personalize.training.multi_concept import multi_concept_run
from personalize.training.single_image import single_image_run
from tests.bench.speed.arms import exponent, facts, spread
from tests.bench.speed.bases import base
from tests.bench.speed.setup import picture, run_of, stepper

if TYPE_CHECKING:
    from personalize.models.stable_diffusion import StableDiffusion
    from tests.bench.speed.bench import SpeedBench

Timer = Callable[[float], list[float]]


def growth(bench: SpeedBench) -> list[dict[str, Any]]:
    """A row for each kind of size: milliseconds at each size, and the exponent of the power law."""
    model = base(bench.base)
    native = bench.latent or model.unet.config.sample_size
    kinds: dict[str, tuple[Sequence[float], Timer]] = {
        "samples": ((8, 16, 32, 64), lambda n: _repeated(bench, lambda: _learned(model, int(n), bench))),
        "pixels": ([(native * f) ** 2 for f in (0.5, 1, 1.5, 2)],
                   lambda n: _updates(bench, lambda: run_of(model, bench.batch, bench.rank, round(n**0.5)))),
        "rank": ((4, 8, 16, 32, 64), lambda n: _updates(bench, lambda: run_of(model, bench.batch, int(n), native))),
        "concepts": ((1, 2, 3), lambda n: _repeated(bench, lambda: _concepts(model, int(n), bench))),
        "catalogue rows": ((1, 2, 4), lambda n: _repeated(bench, lambda: _rows(model, int(n), bench))),
    }  # fmt: skip
    rows, lines = [], {}
    for kind, (sizes, timer) in kinds.items():
        times = [timer(size) for size in sizes]
        medians = [float(np.median(values)) for values in times]
        power = exponent(sizes, medians)
        lines[f"{kind}: {power:.2f}"] = (sizes, medians)
        rows.append(
            facts(model.device) | {"part": "growth", "arm": f"{kind}, exponent", **spread(times[-1])}
            | {"sizes": list(sizes), "ms": medians, "ratio": power, "ratio_ci95": [0, 0], "ratio_to": "log-log slope"}
        )  # fmt: skip
    plot(lines, bench.output_dir / "growth.png")
    return rows


def _updates(bench: SpeedBench, open_run: Callable[[], AbstractContextManager[Any]]) -> list[float]:
    """Milliseconds of single updates of a run, after one that warms up."""
    with open_run() as run:
        step = stepper(run)
        step()
        return _repeated(bench, step)


def _repeated(bench: SpeedBench, call: Callable[[], Any]) -> list[float]:
    read = time.process_time if bench.clock == "cpu" else time.perf_counter
    times = []
    for _ in range(max(2, bench.groups // 5)):
        start = read()
        call()
        times.append(1e3 * (read() - start))
    return times


def _learned(model: StableDiffusion, samples: int, bench: SpeedBench) -> None:
    samples = max(samples, bench.batch)
    config = SingleImageConfig(
        rank=bench.rank, samples_per_update=bench.batch, train_batch_size=bench.batch, max_train_samples=samples
    )
    with single_image_run(model, picture(model.resolution), "a photo of a cat", config) as run:
        for _ in run.steps():
            pass


def _concepts(model: StableDiffusion, count: int, bench: SpeedBench) -> None:
    subjects = tuple(Subject(f"<c{number}>", noun) for number, noun in enumerate(("cat", "dog", "car")[:count]))
    config = MultiConceptConfig(rank=bench.rank, max_train_steps=4, samples_per_update=2, initializer_token="class")
    with multi_concept_run(model, ConceptPicture(samples.bundled(0).picture, subjects), config) as run:
        for _ in run.steps():
            pass


def _rows(model: StableDiffusion, count: int, bench: SpeedBench) -> None:
    config = SingleImageConfig(
        rank=bench.rank, samples_per_update=bench.batch, train_batch_size=bench.batch, max_train_samples=2 * bench.batch
    )
    with TemporaryDirectory() as place:
        file = Path(place) / "picture.png"
        samples.bundled(0).picture.save(file)
        catalogue, one = Catalogue(Path(place) / "out", config), RowSources(picture=(file,), caption="a photo of a cat")
        for number in range(count):
            row = learn_row(model, Item(number, str(number), one), catalogue)
            assert row["status"] == "done", row


def plot(lines: dict[str, tuple[Sequence[float], Sequence[float]]], path: Path, side: int = 640) -> Path:
    """Save a log-log plot of {label: (sizes, costs)}, each line relative to its first point: slopes are exponents."""
    scaled = {name: (np.log2(np.divide(x, x[0])), np.log2(np.divide(y, y[0]))) for name, (x, y) in lines.items()}
    top = float(np.ceil(max(1.0, *(max(x.max(), y.max()) for x, y in scaled.values()))))
    image = Image.new("RGB", (2 * side, 2 * side), "white")  # drawn at twice the size: smooth lines
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(26)
    margin, room = 140, 2 * side - 220

    def place(x: float, y: float) -> tuple[float, float]:
        return margin + room * x / top, 2 * side - margin - room * max(y, 0.0) / top

    for power in range(int(top) + 1):
        draw.line([place(power, 0), place(power, top)], fill="gainsboro", width=2)
        draw.line([place(0, power), place(top, power)], fill="gainsboro", width=2)
        draw.text((place(power, 0)[0], place(0, 0)[1] + 14), str(2**power), fill="black", font=font, anchor="mt")
        draw.text((margin - 14, place(0, power)[1]), str(2**power), fill="black", font=font, anchor="rm")
    draw.line([place(0, 0), place(top, top)], fill="darkgrey", width=3)
    draw.text((side, 2 * side - 44), "size over the smallest (grey: as cost)", fill="black", font=font, anchor="mm")
    draw.text((margin, 30), "cost over that of the smallest", fill="black", font=font)
    colours = ("crimson", "royalblue", "seagreen", "darkorange", "purple")
    for number, (name, (x, y)) in enumerate(scaled.items()):
        points = [place(float(a), float(b)) for a, b in zip(x, y, strict=True)]
        draw.line(points, fill=colours[number % 5], width=6, joint="curve")
        for left, upper in points:
            draw.ellipse([left - 9, upper - 9, left + 9, upper + 9], fill=colours[number % 5])
        draw.text((margin + 24, 90 + 36 * number), name, fill=colours[number % 5], font=font)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.resize((side, side), Image.Resampling.LANCZOS).save(path)
    return path
