"""What the tab Learn has done: an estimate before the start, a look at every update, and the adapter at the end.

It is imported by the queue's thread alone, for it imports torch.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState
from torch import Tensor

from personalize.editing.config import Sampling
from personalize.editing.editor import Editor
from personalize.formats.compatibility import NO, PARTLY, UNKNOWN, YES
from personalize.formats.inspection import inspect_file
from personalize.io.atomic import write_file
from personalize.io.figures import png
from personalize.io.images import psnr, to_pixels
from personalize.io.plain_files import visible
from personalize.io.progress import listening
from personalize.io.provenance import GENERATED
from personalize.studio.actions import Workbench, read
from personalize.studio.jobs import Job
from personalize.training.config import MultiConceptConfig, extract_config
from personalize.training.data.buckets import FittedImage, fit
from personalize.training.data.concepts import check_prompt, read_picture
from personalize.training.data.images import read_training_images
from personalize.training.loop import StepReport
from personalize.training.memory_advice import check_fits
from personalize.training.memory_estimate import estimate
from personalize.training.multi_concept import multi_concept_run
from personalize.training.run import TrainingRun
from personalize.training.single_image import single_image_run

REPLAY = Sampling(steps=8, scheduler="dpm++_2m")
VERDICTS = (YES, PARTLY, NO, UNKNOWN)  # the best first


def learn(words: list[str], bench: Workbench, job: Job, every: int, folder: Path) -> dict[str, Any]:
    """Carry out the command line of a training; its base is loaded by itself, in the precision that it needs."""
    options, main = read(words)
    bench.forget()
    watcher = Watch(job, options, every, folder)
    try:
        with listening(job.part):
            adapter = main(options, watcher)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)  # or the next training could not choose its precision
    return watcher.results | {"adapter": adapter, "stopped": watcher.stopped, "readers": readers(adapter)}


class Watch:
    """Sees each update of a run: losses, and every so often a replay with its distance from the picture.

    Called with the run and the report of an update, it returns True once the user wants to stop.
    """

    def __init__(self, job: Job, options: Any, every: int, folder: Path) -> None:
        self.job, self.options, self.every, self.folder = job, options, max(1, every), folder
        self.stopped = False
        self.results: dict[str, Any] = {"losses": [], "replays": [], "ceiling": None, "updates": 0}
        self._picture: FittedImage | None = None

    def __call__(self, run: TrainingRun, report: StepReport) -> bool:
        self.results["losses"].append((report.update, float(report.losses["loss"])))
        self.results["updates"] = run.updates
        if report.update % self.every == 0 or report.update == run.updates:
            self._replay(run, report.update)
        self.job.show({**self.results})
        self.stopped = self.job.stopping and report.update < run.updates
        return self.stopped

    def _replay(self, run: TrainingRun, update: int) -> None:
        """Draw the picture as it is learned so far, with the same noise each time."""
        source = self._source(run)
        with run.adapter_removed() as adapter:
            if source is not None and self.results["ceiling"] is None:
                self.results["ceiling"] = _likeness(source, run.model.decode(run.model.encode(source.pixels)).cpu())
            picture = Editor(run.model, adapter).reconstruct(sampling=REPLAY)[0]
        path = write_file(self.folder / f"replay-{update:04d}.png", png(picture, GENERATED))
        near = "" if source is None else f", {_likeness(source, to_pixels(picture)):.1f} dB"
        self.results["replays"].append((path, f"{update}{near}"))

    def _source(self, run: TrainingRun) -> FittedImage | None:
        """The first picture as it is learned; None with several subjects, whose replay differs."""
        if not hasattr(self.options, "instance_mask"):
            return None
        if self._picture is None:
            side = self.options.resolution or run.model.resolution
            image = read_training_images(self.options)[0]
            self._picture = fit(image.image, image.mask, side, 8 * run.model.factor)
        return self._picture


def _likeness(source: FittedImage, drawn: Tensor) -> float:
    """The PSNR of `drawn` (1, 3, H, W) to the picture in dB, without the padding."""
    return psnr(source.own_part(drawn), source.own_part(source.pixels))


def distinct(names: Sequence[str], paths: Sequence[str]) -> list[str]:
    """`names`, those that others have too replaced by their paths, and by their numbers where these are the same."""
    labels = [path if names.count(name) > 1 else name for name, path in zip(names, paths, strict=True)]
    return [f"{one} (picture {number})" if labels.count(one) > 1 else one for number, one in enumerate(labels, 1)]


def check_run(words: list[str], bench: Workbench) -> dict[str, str]:
    """What will be trained, before it is: sizes, tokens of the captions, memory and time."""
    options, main = read(words)
    named = options.pretrained_model_name_or_path
    model = bench.model(None if named in (None, "embedded") else named)
    rows: dict[str, str] = {}
    with ExitStack() as stack:
        if hasattr(options, "instance_mask"):
            images = read_training_images(options)
            side = options.resolution or model.resolution
            pictures = [fit(image.image, image.mask, side, 8 * model.factor) for image in images]
            names = distinct([Path(image.name).name for image in images], [image.name for image in images])
            for image, picture, name in zip(images, pictures, names, strict=True):
                rows[name] = _size_note(picture, *["masked"] * bool(image.mask))
                caption = "Caption" if len(images) == 1 else f"Caption of {name}"
                rows[f"{caption}, as the base reads it"] = " · ".join(model.tokens(image.caption))
            settings = sys.modules[main.__module__].training_config(options)
            run: Any = stack.enter_context(single_image_run(model, pictures, [one.caption for one in images], settings))
        else:
            picture = read_picture(options)
            check_prompt(model, picture)
            settings = extract_config(options, MultiConceptConfig)
            run = stack.enter_context(multi_concept_run(model, picture, settings, resolution=options.resolution))
            rows[Path(str(options.picture)).name] = _size_note(run.fitted)
            rows["Prompt, as the base reads it"] = " · ".join(model.tokens(run.caption))
            rows["Class pictures"] = f"{options.num_class_images}, drawn once and kept"
        began = time.perf_counter()
        expected = estimate(run)
        seconds = (time.perf_counter() - began) * run.updates * run.shard.samples
        rows["Updates"] = f"{run.updates}, of {run.shard.samples} samples each"
        rows["Memory"] = str(expected).removeprefix("Memory, ")
        rows["Time"] = f"about {seconds / 60:.0f} min" if seconds > 90 else f"about {seconds:.0f} s"
        if advice := check_fits(expected, run):
            rows["Too little memory"] = advice
    AcceleratorState._reset_state(reset_partial_state=True)
    return rows


def _size_note(picture: FittedImage, *more: str) -> str:
    """The size in which a picture is learned, and what is cut of it or padded."""
    notes = (f"{picture.size[1]}×{picture.size[0]} px", picture.cut, picture.padding, *more)
    return ", ".join(filter(None, notes))


def readers(adapter: Path) -> dict[str, tuple[str, str]]:
    """Who can read the files of an adapter folder, and by which of them: program → verdict, file or reason."""
    best: dict[str, tuple[str, str]] = {}
    for path in visible(adapter, "*.safetensors"):
        if path.name.startswith("source"):
            continue
        for program, (verdict, reason) in inspect_file(path).readers.items():
            known = best.get(program)
            if known is None or VERDICTS.index(verdict) < VERDICTS.index(known[0]):
                best[program] = verdict, path.name if verdict == YES else reason
    return best
