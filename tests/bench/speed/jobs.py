"""The part of the speed bench about whole jobs, which users wait for: from a picture in memory to the result."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from PIL import Image

from personalize.editing.config import Sampling
from personalize.editing.drag.image import drag_picture
from personalize.editing.editor import Editor
from personalize.io.images import to_image
from personalize.training.batched_adapters import learn_batched
from personalize.training.config import SingleImageConfig
from personalize.training.single_image import learn
from tests.bench.speed.arms import Arm
from tests.bench.speed.setup import Rows, accelerated, freed_memory, model_of, picture, timed

if TYPE_CHECKING:
    from tests.bench.speed.bench import SpeedBench

UPDATES = 40  # of one adapter, each of `batch` samples
STEPS = 50  # of a guided edit
ROWS = 4  # catalogue rows whose adapters are trained in one batch
CAPTION = "a photo of a cat"


def jobs(bench: SpeedBench) -> Rows:
    """Training one adapter, training several of a catalogue, an edit, a drag; milliseconds are per adapter or picture.

    With `--batch 10` an adapter gets the method's 40 updates of 10 samples.  On CUDA it is also trained as a graph.
    """
    model, groups = model_of(bench), max(2, bench.groups // 4)
    side = (bench.latent or int(model.unet.config.sample_size)) * model.factor
    pixels = picture(side)
    image = to_image(pixels)
    plain = SingleImageConfig(
        rank=bench.rank,
        samples_per_update=bench.batch,
        train_batch_size=bench.batch,
        max_train_samples=UPDATES * bench.batch,
    )
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
    middle, mask = side / 2, Image.new("L", image.size)
    mask.paste(255, (side // 4, side // 4, side // 2, side // 2))
    points = [(0.75 * middle, 0.75 * middle), (1.25 * middle, 0.75 * middle)]
    with Editor(model, adapter) as editor:
        sampling = Sampling(STEPS, size=(side, side))
        edit = Arm(f"an edit of {STEPS} guided steps", lambda: editor.edit(CAPTION, sampling=sampling))
        rows += timed(bench, "jobs", [edit], **how)
    drag = Arm("a drag", lambda: drag_picture(model, image, points, mask=mask, resolution=side))
    return rows + timed(bench, "jobs", [drag], **how)
