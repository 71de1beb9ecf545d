"""Several devices: two GPUs, models spread or offloaded, and runs on one device after another in one process."""

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator

from personalize.editing.editor import Editor
from personalize.models.stable_diffusion import StableDiffusion
from personalize.training.memory_estimate import estimate
from personalize.training.single_image import learn, single_image_run
from tests.rehearsal.support import (
    CAPTION,
    MORE,
    STEPS,
    apart,
    base,
    concepts,
    devices,
    difference,
    dragged,
    drawn,
    edited,
    learned,
    on_cpu,
    pipeline,
)
from tests.support.runs import SMALL, pixels


@pytest.fixture(scope="module")
def adapter():
    return on_cpu(learned)[1]


ON_SECOND = {
    "learn": lambda model: learned(model), "graph": lambda model: learned(model, replace(MORE, cuda_graph=True)),
    "several concepts": lambda model: concepts(model), "estimate": lambda model: _estimated(model),
    "photo": lambda model: edited(model), "null-text": lambda model: edited(model, "null-text"),
    "drag": lambda model: dragged(model),
    "edit": lambda model: Editor(model, learned(model)[1]).edit("a dog", sampling=STEPS),
}  # fmt: skip


def _estimated(model):
    with single_image_run(model, pixels(), CAPTION, SMALL) as run:
        return estimate(run)


@pytest.mark.parametrize("job", ON_SECOND)
def flow_second_gpu_alone(job, held):
    """Nothing is put on cuda:0, also in between, and the model stays where it was."""
    before, model = held(0), base(device="cuda:1")
    torch.cuda.reset_peak_memory_stats(0)
    ON_SECOND[job](model)
    assert set(devices(model).values()) == {"cuda:1"}
    assert torch.cuda.max_memory_allocated(0) == before and held(0) == before


@pytest.mark.parametrize("order", [("cpu", "cuda", "cpu"), ("cuda", "cpu", "cuda:1"), ("cuda:1", "cuda:0", "cpu")])
@pytest.mark.parametrize("job", [learned, concepts])
def flow_one_device_after_another(job, order):
    """The adapters of runs in one process are those of runs alone, and no model is moved."""
    for device in order:
        model = base(device=device)
        before = devices(model)
        losses, adapter = job(model)
        assert devices(model) == before
        assert losses == pytest.approx(on_cpu(job)[0], rel=1e-5)
        # Adam makes a whole step of a gradient that is nothing but rounding, which is another one on another device
        assert difference(adapter, on_cpu(job)[1]) < (1e-7 if device == "cpu" else 5e-4)


def flow_accelerator_of_another_device():
    """The user's own Accelerator decides the precision, not where the model is."""
    accelerator = Accelerator(mixed_precision="bf16")
    model = base(device="cuda:1")
    learn(model, pixels(), CAPTION, SMALL, accelerator=accelerator)
    assert set(devices(model).values()) == {"cuda:1"}


def _spread(**places):
    pipe = pipeline(device="cuda:0")
    for name, device in places.items():
        getattr(pipe, name).to(device)
    return StableDiffusion.from_pipeline(pipe, name="tiny-sd1")


SPREAD = [{"text_encoder": "cpu"}, {"vae": "cpu"}, {"text_encoder": "cuda:1", "vae": "cuda:1"}, {"unet": "cuda:1"},
          {"text_encoder": "cpu", "vae": "cuda:1"}]  # fmt: skip


@pytest.mark.parametrize("places", SPREAD, ids=str)
def flow_parts_on_different_devices(places, adapter):
    model = _spread(**places)
    before, reference = devices(model), on_cpu(drawn, "sd1", adapter)
    assert apart(drawn(model, adapter), reference) < 0.5
    assert learned(model)[0] == pytest.approx(on_cpu(learned)[0], rel=1e-5)
    assert apart(edited(model), on_cpu(edited)) < 2
    assert concepts(model)[0] == pytest.approx(on_cpu(concepts)[0], rel=1e-4)
    assert devices(model) == before


def flow_base_moved_after_its_handle_was_made(adapter):
    pipe = pipeline(device="cpu")
    model = StableDiffusion.from_pipeline(pipe, name="tiny-sd1")
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.to("cuda")
    learned(model, replace(MORE, cuda_graph=True))
    assert Editor(model, adapter).edit("a dog", sampling=STEPS)


def flow_model_offload(adapter):
    """diffusers moves whole parts: the model works, and the hooks stay."""
    pipe = pipeline(device="cpu")
    pipe.enable_model_cpu_offload(device="cuda")
    model = StableDiffusion.from_pipeline(pipe, name="tiny-sd1")
    reference = on_cpu(drawn, "sd1", adapter)
    assert apart(drawn(model, adapter), reference) < 0.5
    assert learned(model)[0] == pytest.approx(on_cpu(learned)[0], rel=1e-5)
    assert pipe.unet._hf_hook is not None
