"""The part of the speed bench about what users wait for: whole jobs, from a picture in memory to what was asked for."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from personalize.configs import SingleImageConfig
from PIL import Image

from personalize.dragging import drag_picture
from personalize.editor import Editor
from personalize.images import to_image
from personalize.learning import learn
from personalize.settings import Sampling
from personalize.several import learn_batched
from tests.bench.arms import Arm
from tests.bench.speed_setup import Rows, accelerated, freed_memory, model_of, picture, timed

if TYPE_CHECKING:
    from tests.bench.speed import SpeedBench

UPDATES, STEPS, ROWS = 40, 50, 4  # of `batch` samples; of a guided edit; catalogue rows that are learned together
CAPTION = "a photo of a cat"


def jobs(bench: SpeedBench) -> Rows:
    """One adapter, adapters of a catalogue, an edit by one of them, a drag; a line's milliseconds are those of one.

    With `--batch 10` an adapter takes the method's 40 updates of 10 samples; on CUDA the updates are one graph.
    """
    model, groups = model_of(bench), max(2, bench.groups // 4)
    side = (bench.latent or int(model.unet.config.sample_size)) * model.factor
    pixels = picture(side)
    seen = to_image(pixels)
    plain = SingleImageConfig(rank=bench.rank, train_batch_size=bench.batch, max_train_samples=UPDATES * bench.batch)
    configs = {"one adapter": plain}
    if model.device.type == "cuda":
        configs["one adapter, as a graph"] = replace(plain, cuda_graph=True)
    accelerator = accelerated(model)
    adapter = learn(model, pixels, CAPTION, plain, accelerator=accelerator)
    kept = partial(freed_memory, True)  # as in the commands that train
    arms = [
        Arm(name, lambda config=config: learn(model, pixels, CAPTION, config, accelerator=accelerator), kept)
        for name, config in configs.items()
    ]
    how = {"groups": groups, "warmup": 0}
    rows = timed(bench, "jobs", arms, **how)
    many = [(pixels, CAPTION)] * ROWS
    together = Arm(
        f"{ROWS} rows of a catalogue", lambda: learn_batched(model, many, plain, accelerator=accelerator), kept
    )  # fmt: skip
    rows += timed(bench, "jobs", [together], per=ROWS, **how)
    middle, mask = side / 2, Image.new("L", seen.size)
    mask.paste(255, (side // 4, side // 4, side // 2, side // 2))
    points = [(0.75 * middle, 0.75 * middle), (1.25 * middle, 0.75 * middle)]
    with Editor(model, adapter) as editor:
        sampling = Sampling(STEPS, size=(side, side))
        edit = Arm(f"an edit of {STEPS} guided steps", lambda: editor.edit(CAPTION, sampling=sampling))
        rows += timed(bench, "jobs", [edit], **how)
    drag = Arm("a drag", lambda: drag_picture(model, seen, points, mask=mask, resolution=side))
    return rows + timed(bench, "jobs", [drag], **how)
