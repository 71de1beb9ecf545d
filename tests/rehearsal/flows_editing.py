"""Sampling and editing on the pretended device: the pictures of the CPU, whose kernels these are."""

import pytest
import torch

from personalize.editing.config import DynamicSettings, Sampling, UniformSettings
from personalize.editing.drag.config import DragSettings
from personalize.editing.editor import Editor
from personalize.editing.real_image_settings import EditRequest
from personalize.evaluation.scoring import Scores
from personalize.models.loading import default_dtype
from personalize.models.stable_diffusion import StableDiffusion
from personalize.sampling.config import SCHEDULERS
from personalize.sampling.inversion import METHODS
from personalize.training.single_image import learn
from tests.rehearsal.support import (
    STEPS,
    SUBJECTS,
    apart,
    base,
    concepts,
    dragged,
    edited,
    learned,
    mask,
    on_cpu,
    photo,
)
from tests.support.runs import SMALL, pixels

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ON_BEACH = EditRequest("a photo of a dog on the beach")
LEVEL = 0.5  # of 255: rounding moves few pixels over the edge of a level


@pytest.fixture(scope="module")
def adapters():
    return {name: on_cpu(learned, name)[1] for name in ("sd1", "sd2v", "sdxl")}


@pytest.mark.parametrize("name, dtype", [("sd1", FP32), ("sd2v", FP32), ("sdxl", FP32), ("sd1", BF16), ("sdxl", FP16)])
def flow_edit(adapters, name, dtype):
    settings = {"forget": "decoder=0.5", "negative_prompt": "blue", "sampling": STEPS, "seeds": (0, 1)}
    ours = Editor(base(name, dtype=dtype), adapters[name]).edit("a dog", **settings)
    theirs = Editor(base(name, "cpu"), adapters[name]).edit("a dog", **settings)
    assert max(map(apart, ours, theirs)) < (LEVEL if dtype == FP32 else 16)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def flow_schedulers(adapters, scheduler):
    settings = Sampling(steps=4, scheduler=scheduler)
    ours, theirs = (
        Editor(base(device=device), adapters["sd1"]).edit("a dog", sampling=settings) for device in ("cuda", "cpu")
    )
    assert apart(ours[0], theirs[0]) < LEVEL


def flow_editor_as_context(adapters):
    editor = Editor(base(), adapters["sd1"])
    before = editor.base("a dog", sampling=STEPS)[0]
    with editor:
        assert apart(editor.base("a dog", sampling=STEPS)[0], before) == 0
        inside = editor.reconstruct(sampling=STEPS)[0]
    assert apart(editor.reconstruct(sampling=STEPS)[0], inside) == 0


def flow_choose(adapters):
    class Fixed:
        name, copy_distance, lost_distance = "fixed", 0.25, 0.65

        def __call__(self, pictures, request):
            return [Scores(0.9, 0.8, 0.4) for _ in pictures]

    editor = Editor(base(device="cuda:1"), adapters["sd1"])
    assert len(editor.choose("a dog", photo(), budget=3, scorer=Fixed(), sampling=Sampling(steps=2))) == 3


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def flow_photo(method, name):
    request = ON_BEACH if method == "none" else None
    assert apart(edited(base(name), method, request), on_cpu(edited, name, method, request)) < 2  # fitted embeddings


@pytest.mark.parametrize("method", ["direct", "null-text", "ddpm"])
def flow_photo_bf16(method):
    assert apart(edited(base(dtype=BF16), method), on_cpu(edited, "sd1", method)) < 40  # bf16 adds up over steps


@pytest.mark.parametrize(
    "settings",
    [{"dynamic": DynamicSettings()}, {"uniform": UniformSettings()}, {"controller": "mutual"}, {"fixed_point": 2}],
    ids=lambda settings: next(iter(settings)),
)
def flow_photo_methods(settings):
    request = ON_BEACH if "uniform" in settings or "controller" in settings else None
    ours, theirs = (edited(base(device=device), request=request, **settings) for device in ("cuda:1", "cpu"))
    assert apart(ours, theirs) < 2


def flow_photo_inside_a_mask():
    request = EditRequest("a photo of a dog on the beach", strict=True, mask=(12, 16, 36, 40))
    assert apart(edited(base(), request=request, uniform=UniformSettings()), photo()) < 60


@pytest.mark.parametrize("name, dtype", [("sd1", FP32), ("sdxl", BF16)])
@pytest.mark.parametrize("method", ["pixels", "latents"])
def flow_drag(name, dtype, method):
    ours, theirs = dragged(base(name, dtype=dtype), method=method), dragged(base(name, "cpu"), method=method)
    assert apart(ours, theirs) < (LEVEL if dtype == FP32 else 40)


def flow_drag_with_adapter(adapters):
    editor = Editor(base(device="cuda:1"), adapters["sd1"])
    assert editor.drag([(20, 24), (36, 28)], photo(), mask=mask(), settings=DragSettings(steps=4)).image.size == (
        64,
        64,
    )


def flow_concepts():
    adapter = concepts(base())[1]
    prompt = f"a picture of a {SUBJECTS[0].token} cat on the beach"
    ours, theirs = (Editor(base(device=device), adapter).edit(prompt, sampling=STEPS)[0] for device in ("cuda", "cpu"))
    assert apart(ours, theirs) < LEVEL


def flow_four_bits(adapters):
    model = base(dtype=BF16)
    model.quantize()
    assert Editor(model, adapters["sd1"]).edit("a dog", sampling=STEPS)[0].size == (64, 64)


def flow_embedded_model():
    model = StableDiffusion.load()
    assert (model.device.type, model.dtype) == ("cuda", BF16)
    picture = torch.nn.functional.interpolate(pixels(), (model.resolution, model.resolution))
    adapter = learn(model, picture, "a cat", SMALL)
    assert len(Editor(model, adapter).choose("a dog", photo(), budget=2, sampling=Sampling(steps=2))) == 2


@pytest.mark.parametrize("capability, dtype", [((7, 5), FP32), ((7, 0), FP32), ((8, 0), BF16), ((9, 0), BF16)])
def flow_emulated_bf16_is_no_bf16(monkeypatch, capability, dtype):
    """T4, V100 and RTX 20xx: torch says True unless it is told to leave emulation out."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    native = capability >= (8, 0)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    assert default_dtype(torch.device("cuda")) == dtype
