"""Small models on the pretended device, and the jobs that the flows are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

from personalize.adapters.adapter import Adapter
from personalize.adapters.subjects import Subject
from personalize.editing.config import Sampling
from personalize.editing.drag.config import DragSettings
from personalize.editing.drag.image import drag_picture
from personalize.editing.editor import Editor
from personalize.editing.photo_settings import PhotoSettings
from personalize.editing.real_image import edit_photo
from personalize.editing.real_image_settings import EditRequest
from personalize.models.stable_diffusion import StableDiffusion
from personalize.sampling.config import NullTextSettings
from personalize.training.config import MultiConceptConfig, SingleImageConfig
from personalize.training.data.concepts import ClassImage, ConceptPicture
from personalize.training.multi_concept import multi_concept_run
from personalize.training.single_image import single_image_run
from tests.rehearsal.plugin import KIND
from tests.support.runs import SMALL, pixels
from tests.support.tiny import tiny_pipeline

CAPTION, SIDE = "a photo of a cat", 64
MORE = replace(SMALL, max_train_samples=8)  # a graph is captured after three updates
STEPS = Sampling(steps=4)
SUBJECTS = (Subject("<cat1>", "cat", 2), Subject("<dog1>", "dog"))


def pipeline(name: str = "sd1", device: str = KIND, dtype: torch.dtype = torch.float32) -> Any:
    """A stock pipeline on `device`, its UNet in `dtype`."""
    pipe = tiny_pipeline(name)
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.to(device)
    pipe.unet.to(dtype)
    return pipe


def base(name: str = "sd1", device: str = KIND, dtype: torch.dtype = torch.float32) -> StableDiffusion:
    return StableDiffusion.from_pipeline(pipeline(name, device, dtype), name=f"tiny-{name}")


def photo(seed: int = 0, side: int = SIDE) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (side // 4, side // 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)


def mask() -> Image.Image:
    """White where the dragged thing is: the attention of a random model sets nothing apart."""
    white = Image.new("L", (SIDE, SIDE))
    white.paste(255, (12, 16, 36, 40))
    return white


def class_image() -> ClassImage:
    return ClassImage("a photo of a dog", photo(3))


def learned(
    model: StableDiffusion,
    config: SingleImageConfig = SMALL,
    precision: str = "no",
    caption: str = CAPTION,
    **more: Any,
) -> tuple[list[float], Adapter]:
    """The losses of all updates, and the adapter; with Accelerate's own device only if a precision is asked for."""
    accelerator = None if precision == "no" else Accelerator(cpu=model.device.type == "cpu", mixed_precision=precision)
    with single_image_run(model, pixels(), caption, config, accelerator=accelerator, **more) as run:
        losses = [report.losses["loss"] for report in run.steps()]
        return [float(loss) for loss in losses], run.adapter()


def concepts(
    model: StableDiffusion, precision: str = "no", updates: int = 3, **settings: Any
) -> tuple[list[float], Adapter]:
    """As `learned`, of two concepts in one picture."""
    rates: Any = {"learning_rate": 1e-2, "token_learning_rate": 1e-2}
    config = MultiConceptConfig(rank=2, max_train_steps=updates, samples_per_update=2, **(rates | settings))
    accelerator = None if precision == "no" else Accelerator(cpu=model.device.type == "cpu", mixed_precision=precision)
    picture = ConceptPicture(photo(1, 72), SUBJECTS)
    more: Any = {"class_images": (ClassImage("photo of a cat and dog", photo(4)),), "accelerator": accelerator}
    with multi_concept_run(model, picture, config, **more) as run:
        losses = [report.losses["loss"] for report in run.steps()]
        return [float(loss) for loss in losses], run.adapter()


def edited(
    model: StableDiffusion, inversion: str = "direct", request: EditRequest | None = None, **settings: Any
) -> Any:
    """The picture of a photo's edit by Prompt-to-Prompt with a local blend, or of another `request`."""
    swap = EditRequest("a photo of a dog on the beach", local=[("cat", "dog")], weights={"dog": 2.0})
    fitted = NullTextSettings(iterations=2)
    chosen = PhotoSettings(**{"inversion": inversion, "steps": 4, "null_text": fitted, **settings})  # type: ignore
    return edit_photo(model, photo(), "a photo of a cat on the beach", request or swap, chosen).image


def drawn(model: StableDiffusion, adapter: Adapter, sampling: Sampling = STEPS) -> Image.Image:
    """A picture of an edit with `adapter`."""
    return Editor(model, adapter).edit("a dog", sampling=sampling)[0]


def dragged(model: StableDiffusion, steps: int = 4, **settings: Any) -> Image.Image:
    """A picture whose thing, inside `mask`, is dragged."""
    chosen = DragSettings(steps=steps, **{"strength": 1.0, **settings})
    return drag_picture(model, photo(), [(20, 24), (36, 28)], mask=mask(), settings=chosen, prompt="a cat").image


def devices(model: StableDiffusion) -> dict[str, str]:
    """Where each part of a model is."""
    parts = {"unet": model.unet, "vae": model.vae, "text_encoder": model.text_encoders[0]}
    return {name: str(next(part.parameters()).device) for name, part in parts.items()}


def difference(one: Adapter, other: Adapter) -> float:
    """The largest difference of a LoRA weight."""
    assert set(one.lora) == set(other.lora)
    return max(float((one.lora[key] - other.lora[key]).abs().max()) for key in one.lora)


def apart(one: Image.Image, other: Image.Image) -> float:
    """The mean difference of two pictures, in levels of 0 to 255."""
    pair = [np.asarray(picture, np.float64) for picture in (one, other)]
    return float(np.abs(pair[0] - pair[1]).mean())


_ON_CPU: dict[str, Any] = {}


def on_cpu(job: Callable[..., Any], name: str = "sd1", *args: Any, **settings: Any) -> Any:
    """What `job` returns for the same model on the CPU; computed once in a process."""
    key = repr((job, name, [id(one) if isinstance(one, Adapter) else one for one in args], settings))
    if key not in _ON_CPU:
        _ON_CPU[key] = job(base(name, "cpu"), *args, **settings)
    return _ON_CPU[key]
