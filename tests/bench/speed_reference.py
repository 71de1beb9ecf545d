"""Ours against diffusers' own `train_dreambooth_lora.py`: same base, modules, rank, resolution, batch and precision.

Its folder gets ten copies of the picture, for with one its batches are of one.  Its time is that between the ends of
its optimiser steps, without loading, the prompt and saving; ours is everything between the
picture's file and the adapter's.
Its flags are the fastest it has: text embeddings computed beforehand, no validation, no checkpoints.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from personalize import bundled
from personalize.images import fit, load_image
from personalize.learning import learn
from personalize.lora import module_names
from personalize.model import EMBEDDED, StableDiffusion
from personalize.recipes import Recipe
from tests.bench.arms import facts, ratio, spread
from tests.bench.speed_setup import accelerated, model_of

if TYPE_CHECKING:
    from tests.bench.speed import SpeedBench

SCRIPT = "examples/dreambooth/train_dreambooth_lora.py"
TARGETS = 'target_modules=["to_k", "to_q", "to_v", "to_out.0", "add_k_proj", "add_v_proj"],'
COPIES = 10  # at least; a multiple of the batch, for a last batch that is smaller would be half a step
SIDE = 1024  # of the picture's file
CAPTION = "a photo of a cat"


def reference(bench: SpeedBench) -> list[dict[str, Any]]:
    """Milliseconds per update of ours and theirs, end to end, in turns."""
    if bench.reference is None:
        raise SystemExit("part reference needs --reference: a diffusers checkout, or its train_dreambooth_lora.py")
    script = bench.reference if bench.reference.is_file() else bench.reference / SCRIPT
    model = model_of(bench)
    theirs: list[float] = []
    ours: list[float] = []
    with TemporaryDirectory() as place:
        work = Path(place)
        picture = work / "picture.jpg"
        bundled.bundled(0).picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS).save(picture)
        patched = patch(script, model, work, bench.batch)
        folder = _folder(bench.base, model, work)
        side = (bench.latent or model.unet.config.sample_size) * model.factor
        for group in range(max(2, bench.groups // 5)):
            turns = [lambda: theirs.extend(_theirs(bench, patched, folder, side, work)),
                     lambda: ours.append(_ours(bench, model, picture, side, work))]  # fmt: skip
            for turn in turns if group % 2 == 0 else turns[::-1]:
                turn()
    common = facts(model.device) | {"part": "end to end", "groups": len(ours), "clock": "wall", "batch": bench.batch}
    count = len(ours)
    medians = [float(np.median(part)) for part in np.array_split(theirs, count)]
    return [
        common | {"arm": "diffusers' script", **spread(theirs), **ratio(medians, medians), "ratio_to": "itself"},
        common | {"arm": "ours", **spread(ours), **ratio(medians, ours), "ratio_to": "diffusers' script"},
    ]


def patch(script: Path, model: StableDiffusion, work: Path, batch: int) -> Path:
    """A copy of the script that trains the modules that we train."""
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
    """The base as a folder for their script."""
    if name == "embedded":
        return EMBEDDED
    if name != "sd15":
        return Path(name)
    model.pipeline().save_pretrained(work / "base")
    return work / "base"


def _theirs(bench: SpeedBench, script: Path, folder: Path, side: int, work: Path) -> list[float]:
    """Milliseconds of each update but the first."""
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
        "tests.bench.reference_child",
        str(marks),
        str(script),
        "--pre_compute_text_embeddings",
    ]
    line += [word for key, value in arguments.items() for word in (f"--{key}", str(value))]
    done = subprocess.run(line, capture_output=True, text=True, check=False, env=os.environ)
    if done.returncode or not marks.is_file():
        raise SystemExit(f"diffusers' script failed: {done.stderr.strip().splitlines()[-1:]}")
    ends = json.loads(marks.read_text(encoding="utf-8"))["ends"]
    marks.unlink()
    return [1e3 * (after - before) for before, after in zip(ends, ends[1:], strict=False)]


def _ours(bench: SpeedBench, model: StableDiffusion, picture: Path, side: int, work: Path) -> float:
    """Milliseconds per update of everything between the picture's file and the adapter's."""
    start = time.perf_counter()
    pixels, _ = fit(load_image(picture), side, 8 * model.factor)
    recipe = Recipe(rank=bench.rank, train_batch_size=bench.batch, max_train_samples=bench.steps * bench.batch)
    learn(model, pixels, CAPTION, recipe, accelerator=accelerated(model)).save(work / "ours" / str(time.time_ns()))
    return 1e3 * (time.perf_counter() - start) / bench.steps
