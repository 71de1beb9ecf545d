"""The part of the speed bench about diffusers' `train_dreambooth_lora.py`: its training time against ours.

Base, LoRA modules, rank, resolution, batch and precision are the same, and its flags are the fastest it has: text
embeddings computed in advance, no validation, no checkpoints.  Its data folder holds at least ten copies of the
picture, because it makes no batch larger than its data set.  Both are timed from the loaded base to the saved adapter:
theirs from the moment its UNet gets the adapter, ours from reading the picture's file.  For longer runs, the time from
the end of one update to the end of the next counts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from personalize.adapters.lora import module_names
from personalize.embedded import samples
from personalize.io.image_files import load_image
from personalize.models.stable_diffusion import EMBEDDED, StableDiffusion
from personalize.training.config import SingleImageConfig
from personalize.training.data.buckets import fit
from personalize.training.single_image import single_image_run
from tests.bench.speed.arms import facts, ratio, spread
from tests.bench.speed.setup import accelerated, freed_memory, model_of

if TYPE_CHECKING:
    from tests.bench.speed.bench import SpeedBench

SCRIPT = "examples/dreambooth/train_dreambooth_lora.py"
TARGETS = 'target_modules=["to_k", "to_q", "to_v", "to_out.0", "add_k_proj", "add_v_proj"],'
COPIES = 10  # at least, rounded up to a multiple of the batch, so that no batch is smaller than the others
SIDE = 1024  # px, of the picture's file
CAPTION = "a photo of a cat"


class Run(NamedTuple):
    """Milliseconds of one training: of the whole run, divided by its updates, and of each update but the first."""

    whole: float
    updates: list[float]


def run_of_marks(began: float, steps: list[float], saved: float) -> Run:
    """The `Run` of three marks in seconds: when it began, when each update ended, when the adapter was saved."""
    updates = [1e3 * (after - before) for before, after in pairwise(steps)]
    return Run(1e3 * (saved - began) / len(steps), updates)


def reference(bench: SpeedBench) -> list[dict[str, Any]]:
    """Milliseconds per update of their script and ours, run alternately: of the whole run, and of further updates."""
    if bench.reference is None:
        raise SystemExit("part reference needs --reference: a diffusers checkout, or its train_dreambooth_lora.py")
    script = bench.reference if bench.reference.is_file() else bench.reference / SCRIPT
    model = model_of(bench)
    theirs: list[Run] = []
    ours: list[Run] = []
    with TemporaryDirectory() as place:
        work = Path(place)
        picture = work / "picture.jpg"
        samples.bundled(0).picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS).save(picture)
        patched = patch(script, model, work, bench.batch)
        folder = _folder(bench.base, model, work)
        side = (bench.latent or model.unet.config.sample_size) * model.factor
        for group in range(max(2, bench.groups // 5)):
            turns = [lambda: theirs.append(_theirs(bench, patched, folder, side, work)),
                     lambda: ours.append(_ours(bench, model, picture, side, work))]  # fmt: skip
            for turn in turns if group % 2 == 0 else turns[::-1]:
                turn()
    common = facts(model.device) | {"groups": len(ours), "clock": "wall", "batch": bench.batch, "updates": bench.steps}
    rows = []
    for part, pick in (("end to end", lambda run: [run.whole]), ("each further update", lambda run: run.updates)):
        first = [float(np.median(pick(run))) for run in theirs]
        for arm, runs in (("diffusers' script", theirs), ("ours", ours)):
            times = [pick(run) for run in runs]
            row = common | {"part": part, "arm": arm, **spread([time for one in times for time in one])}
            medians = [float(np.median(one)) for one in times]
            rows.append(row | ratio(first, medians) | {"ratio_to": "diffusers' script"})
    return rows


def patch(script: Path, model: StableDiffusion, work: Path, batch: int) -> Path:
    """Copy the script so that it trains the modules that we train, and fill its data folder; returns the copy.

    Raises:
        SystemExit: the script is of a version with other target modules.
    """
    text = script.read_text(encoding="utf-8")
    if text.count(TARGETS) != 1:
        raise SystemExit(f"{script} is another version than this bench knows: its target modules moved")
    names = module_names(model.unet)
    copy = work / "train_dreambooth_lora.py"
    copy.write_text(text.replace(TARGETS, f"target_modules={names!r},"), encoding="utf-8")
    data = work / "pictures"
    data.mkdir()
    for number in range(-(-COPIES // batch) * batch):
        (data / f"{number}.jpg").write_bytes((work / "picture.jpg").read_bytes())
    return copy


def _folder(name: str, model: StableDiffusion, work: Path) -> Path:
    """The base `name` as a folder that their script can load."""
    if name == "embedded":
        return EMBEDDED
    if name != "sd15":
        return Path(name)
    model.pipeline().save_pretrained(work / "base")
    return work / "base"


def _theirs(bench: SpeedBench, script: Path, folder: Path, side: int, work: Path) -> Run:
    marks = work / "marks.json"
    arguments = {
        "pretrained_model_name_or_path": folder, "instance_data_dir": work / "pictures", "instance_prompt": CAPTION,
        "resolution": side, "train_batch_size": bench.batch, "max_train_steps": bench.steps, "rank": bench.rank,
        "mixed_precision": bench.mixed_precision, "learning_rate": 1e-3, "seed": 0, "lr_scheduler": "constant",
        "lr_warmup_steps": 0, "checkpointing_steps": 10**6, "output_dir": work / "theirs",
    }  # fmt: skip
    line = [
        sys.executable,
        "-m",
        "tests.bench.speed.reference_child",
        str(marks),
        str(script),
        "--pre_compute_text_embeddings",
    ]
    line += [word for key, value in arguments.items() for word in (f"--{key}", str(value))]
    done = subprocess.run(line, capture_output=True, text=True, check=False, env=os.environ)
    if done.returncode or not marks.is_file():
        raise SystemExit(f"diffusers' script failed: {done.stderr.strip().splitlines()[-1:]}")
    times = json.loads(marks.read_text(encoding="utf-8"))
    marks.unlink()
    return run_of_marks(times["began"][0], times["steps"], times["saved"][-1])


def _ours(bench: SpeedBench, model: StableDiffusion, picture: Path, side: int, work: Path) -> Run:
    began = time.perf_counter()
    pixels = [fit(load_image(picture), None, side, 8 * model.factor)]
    samples = bench.steps * bench.batch
    config = SingleImageConfig(
        rank=bench.rank, samples_per_update=bench.batch, train_batch_size=bench.batch, max_train_samples=samples
    )
    steps = []
    accelerator = accelerated(model)
    with freed_memory(True), single_image_run(model, pixels, CAPTION, config, accelerator=accelerator) as run:
        for _ in run.steps():
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            steps.append(time.perf_counter())
        run.adapter().save(work / "ours" / str(time.time_ns()))
    return run_of_marks(began, steps, time.perf_counter())
