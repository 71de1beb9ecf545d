"""Options of training together with precisions, with CUDA graphs and with pictures drawn in between."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from personalize.editing.editor import Editor
from personalize.editing.photo_settings import PhotoSettings
from personalize.editing.real_image_settings import EditRequest
from personalize.errors import UserError
from personalize.training.single_image import single_image_run
from tests.rehearsal.support import (
    CAPTION,
    MORE,
    STEPS,
    apart,
    base,
    class_image,
    concepts,
    difference,
    drawn,
    learned,
    on_cpu,
    photo,
    pipeline,
)
from tests.support.runs import SMALL, pixels

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CLASS_PICTURE = {"class_images": (class_image(),)}
MASK = {"masks": torch.ones(1, 1, 64, 64)}
KINDS = {  # changes of the settings, and what the run is given besides
    "class picture": ({"resample_latents": True}, CLASS_PICTURE), "mask": ({"mask_weight": 1.0}, MASK),
    "snr": ({"snr_gamma": 5.0}, {}), "checkpointing": ({"gradient_checkpointing": True}, {}),
    "clipped, two batches": ({"max_grad_norm": 1.0, "samples_per_update": 2, "train_batch_size": 1}, {}),
    "all layers": ({"targets": "full", "max_train_samples": 2}, {}), "eight bits": ({"use_8bit_adam": True}, {}),
    "text encoder": ({"train_text_encoder": True, "gradient_checkpointing": True}, {}),
    "trigger word": ({"instance_token": "<it>"}, {"caption": "a photo of a <it> cat"}),
    "offload": ({"offload": True}, {}), "rank by timestep": ({"min_rank": 1, "orthogonal_start": True}, {}),
    "standalone": ({"standalone": True}, {}),
}  # fmt: skip


@pytest.mark.parametrize("dtype, precision", [(FP32, "fp16"), (FP32, "bf16"), (BF16, "no")], ids=str)
@pytest.mark.parametrize("name", ["sd1", "sdxl"])
@pytest.mark.parametrize("kind", KINDS)
def flow_learn(kind, name, dtype, precision):
    changes, given = KINDS[kind]
    config = replace(SMALL, **changes)
    losses, _ = learned(base(name, dtype=dtype), config, precision, **given)
    assert losses == pytest.approx(on_cpu(learned, name, config, **given)[0], rel=3e-2)  # bf16 has 8 bits


@pytest.mark.parametrize("kind", ["class picture", "mask", "all layers", "standalone"])
def flow_graph(kind):
    """A captured update equals the loop's."""
    changes, given = KINDS[kind]
    config = replace(MORE, **changes | {"max_train_samples": 8})
    plain, graph = (learned(base(), replace(config, cuda_graph=captured), **given) for captured in (False, True))
    assert graph[0] == pytest.approx(plain[0], rel=1e-6) and difference(graph[1], plain[1]) < 1e-6


@pytest.mark.parametrize("between", ["picture", "checkpoint"])
def flow_graph_with_work_in_between(between, tmp_path):
    """Pictures that are drawn, and checkpoints, between replays of a graph leave no trace in the updates."""
    with single_image_run(base(), pixels(), CAPTION, replace(MORE, cuda_graph=True)) as run:
        for report in run.steps():
            if between == "checkpoint":
                run.save_checkpoint(tmp_path)
            elif report.update in (2, 5, 7):
                with run.adapter_removed() as adapter:
                    drawn(run.model, adapter)
        found = run.adapter()
    assert difference(found, learned(base(), MORE)[1]) < 1e-6


CONCEPTS = {
    "checkpointing": {"gradient_checkpointing": True}, "eight bits": {"use_8bit_adam": True},
    "full": {"full_kv": True, "learning_rate": 1e-4}, "plain pictures": {"augment": False, "swap_subjects": 0.0},
    "Custom Diffusion": {"calibration_weight": 0.0}, "text encoder's words": {"initializer_token": "class"},
}  # fmt: skip


@pytest.mark.parametrize("dtype, precision", [(FP32, "fp16"), (FP32, "bf16"), (BF16, "no")], ids=str)
@pytest.mark.parametrize("kind", CONCEPTS)
def flow_concepts(kind, dtype, precision):
    if kind == "full" and dtype == BF16:
        with pytest.raises(UserError, match="must be fp32"):
            concepts(base(dtype=dtype), precision, **CONCEPTS[kind])
        return
    losses, _ = concepts(base(dtype=dtype), precision, **CONCEPTS[kind])
    assert losses == pytest.approx(on_cpu(concepts, "sd1", **CONCEPTS[kind])[0], rel=3e-2)


def flow_concepts_in_four_bits():
    model = base(dtype=BF16)
    model.quantize()
    assert concepts(model, "bf16")[0] == pytest.approx(on_cpu(concepts)[0], rel=0.2)  # weights of 4 bits


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def flow_photo_with_an_adapter(name):
    def edit(model):
        adapter = on_cpu(learned, name)[1]
        request, settings = EditRequest("a photo of a dog"), PhotoSettings(steps=4)
        return Editor(model, adapter).photo(photo(), "a photo of a cat", request, settings).image

    assert apart(edit(base(name)), edit(base(name, "cpu"))) < 2


def flow_device_map_balanced(tmp_path):
    """diffusers spreads the parts of a pipeline over two GPUs; the handle draws what it draws on the CPU."""
    from diffusers import DiffusionPipeline

    import personalize

    adapter = on_cpu(learned)[1]
    adapter.save(tmp_path / "adapter")
    pipeline(device="cpu").save_pretrained(tmp_path / "base")
    room = {0: "3MB", 1: "30MB", "cpu": "1GB"}
    pipe: Any = DiffusionPipeline.from_pretrained(
        tmp_path / "base", device_map="balanced", max_memory=room, safety_checker=None
    )
    assert len(set(pipe.hf_device_map.values())) == 2
    pictures = []
    for one in (pipe, pipeline(device="cpu")):
        with personalize.attach(one, tmp_path / "adapter") as mine:
            generator = torch.Generator().manual_seed(0)
            size = {"height": 64, "width": 64}
            pictures += one(**mine.inputs("a dog"), num_inference_steps=STEPS.steps, generator=generator, **size).images
    assert apart(*pictures) < 0.5
