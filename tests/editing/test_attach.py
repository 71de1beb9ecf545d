"""`personalize.attach` inside stock diffusers pipelines, on random weights of each topology."""

from __future__ import annotations

import inspect
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image

import personalize
from personalize.editing.config import DEFAULT_STRENGTHS, Sampling
from personalize.editing.editor import Editor
from personalize.editing.vector_projection import project
from personalize.errors import UserError
from tests.support.lora_states import random_adapter, text_lora
from tests.support.tiny import tiny

PIPELINES = {
    "sd1": (
        StableDiffusionPipeline, StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline,
        StableDiffusionControlNetPipeline,
    ),
    "sdxl": (
        StableDiffusionXLPipeline, StableDiffusionXLImg2ImgPipeline, StableDiffusionXLInpaintPipeline,
        StableDiffusionXLControlNetPipeline,
    ),
}  # fmt: skip
CASES = [  # SDXL's take longer: one of them is enough by default
    pytest.param(family, cls, marks=pytest.mark.slow if family == "sdxl" and cls is not classes[0] else ())
    for family, classes in PIPELINES.items()
    for cls in classes
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """An adapter folder for each family, with random weights that show."""
    place = tmp_path_factory.mktemp("adapters")
    return {family: random_adapter(tiny(family)).save(place / family) for family in PIPELINES}


def picture(value: int = 120) -> Image.Image:
    return Image.new("RGB", (64, 64), (value, 60, 200))


def built(model, cls):
    """A stock pipeline of class `cls` over the modules of `model`, and what a call of it needs besides prompts."""
    extra, call = {}, {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "np"}
    names = inspect.signature(cls.__call__).parameters
    if "ControlNet" in cls.__name__:
        reducing = (8, 16, 16)  # channels of a picture's way to the latents' size: the VAE's factor is 4
        extra["controlnet"] = ControlNetModel.from_unet(model.unet, conditioning_embedding_out_channels=reducing)
    if "image" in names:
        call["image"] = picture()
    if "mask_image" in names:
        call["mask_image"] = Image.new("L", (64, 64), 255)
    if "strength" in names:
        call["strength"] = 1.0
    pipe = model.pipeline(cls, **extra)
    pipe.set_progress_bar_config(disable=True)
    return pipe, {key: value for key, value in call.items() if key in names}


@pytest.mark.parametrize(("family", "cls"), CASES, ids=lambda case: getattr(case, "__name__", None))
def test_it_works_in_every_stock_pipeline_and_leaves_no_trace(folders, family, cls):
    pipe, call = built(tiny(family), cls)

    def drawn(inputs):
        return torch.from_numpy(pipe(**inputs, **call, generator=torch.Generator().manual_seed(0)).images)

    before, plain = deepcopy(pipe.unet.state_dict()), drawn({"prompt": "a cat on the beach"})
    with personalize.attach(pipe, folders[family]) as mine:
        attached = drawn(mine.inputs("a cat on the beach"))
    assert (attached - plain).abs().max() > 1e-3, "the adapter must show"
    after = pipe.unet.state_dict()
    assert list(before) == list(after) and all(torch.equal(value, after[name]) for name, value in before.items())
    assert torch.equal(plain, drawn({"prompt": "a cat on the beach"}))


def test_it_leaves_no_trace_when_the_body_raises(folders):
    pipe = tiny("sd1").pipeline()
    before = deepcopy(pipe.unet.state_dict())
    with pytest.raises(ZeroDivisionError), personalize.attach(pipe, folders["sd1"]):
        1 / 0  # noqa: B018
    after = pipe.unet.state_dict()
    assert list(before) == list(after) and all(torch.equal(value, after[name]) for name, value in before.items())


def test_embeds_are_passed_as_prompt_embeds(folders):
    pipe, call = built(tiny("sd1"), StableDiffusionPipeline)
    with personalize.attach(pipe, folders["sd1"]) as mine:
        embeds = mine.embeds("a dog on the beach", alpha=0.8, beta=1.2)
        assert embeds.shape == (1, 77, 32)
        target = mine.model.prompts(["a dog on the beach"]).embeds
        torch.testing.assert_close(embeds, project(mine.adapter.source["embeds"], target, 0.8, 1.2))
        assert pipe(prompt_embeds=embeds, **call).images.shape == (1, 64, 64, 3)


def test_without_a_dial_the_weights_are_those_of_an_edit(folders):
    """alpha 0.8 and beta 1.2, as `personalize edit` and `Editor.edit` have them."""
    with personalize.attach(tiny("sd1").pipeline(), folders["sd1"]) as mine:
        usual = project(mine.adapter.source["embeds"], mine.model.prompts(["a dog on the beach"]).embeds, 0.8, 1.2)
        for embeds in (mine.embeds("a dog on the beach"), mine.inputs("a dog on the beach")["prompt_embeds"]):
            torch.testing.assert_close(embeds, usual)
    assert (DEFAULT_STRENGTHS.alpha, DEFAULT_STRENGTHS.beta, DEFAULT_STRENGTHS.gamma) == (0.8, 1.2, None)


@pytest.mark.parametrize("dials", [{}, {"alpha": 0.6, "beta": 1.5}])
def test_it_draws_what_the_editor_draws(folders, dials):
    """The same latents and embeddings in a stock pipeline and in our loop: the pictures agree to 8-bit rounding."""
    model = tiny("sd1")
    editor = Editor(model, personalize.Adapter.load(folders["sd1"]))
    ours = editor.edit("a dog on the beach", **dials, forget="decoder=0.5", sampling=Sampling(steps=3))[0]
    from personalize.sampling.denoise import initial_latents

    pipe = model.pipeline()
    pipe.set_progress_bar_config(disable=True)
    with personalize.attach(pipe, folders["sd1"], forget="decoder=0.5") as mine:
        theirs = pipe(
            **mine.inputs("a dog on the beach", **dials), latents=initial_latents(model, [0]),
            num_inference_steps=3, output_type="pil",
        ).images[0]  # fmt: skip
    difference = torch.tensor(list(ours.getdata())) - torch.tensor(list(theirs.getdata()))
    assert difference.abs().max() <= 1  # one grey level: fp32 sums in another order, then rounding


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_text_encoders_are_changed_too_and_prompts_may_say_learned_tokens(folders, tmp_path, strength):
    """A DreamBooth adapter's prompts are those the editor draws; afterwards they are the base's again."""
    model = tiny("sd1")
    adapter = personalize.Adapter.load(folders["sd1"])
    rows = {"<thing>": {"text_encoder": torch.ones(1, 32)}}
    both = replace(adapter, lora={**adapter.lora, **text_lora(model)}, source=None, concepts=rows)
    prompt, pipe = "a <thing> on the beach", model.pipeline()
    plain = model.prompts([prompt]).embeds
    with personalize.attach(pipe, both.save(tmp_path / "both"), strength=strength) as mine:
        embeds = mine.embeds(prompt)
        stock = pipe.encode_prompt(prompt, "cpu", 1, False)[0]
    torch.testing.assert_close(embeds, Editor(model, both)._encode(prompt, (64, 64), strength).embeds)
    torch.testing.assert_close(embeds, stock)
    assert (embeds - plain).abs().max() > 1e-2
    assert torch.equal(model.prompts([prompt]).embeds, plain)


def test_strength_zero_is_the_base(folders):
    pipe, call = built(tiny("sd1"), StableDiffusionPipeline)
    call |= {"prompt": "a cat", "generator": None}
    plain = pipe(**call | {"generator": torch.Generator().manual_seed(3)}).images
    with personalize.attach(pipe, folders["sd1"], strength=0.0):
        off = pipe(**call | {"generator": torch.Generator().manual_seed(3)}).images
    assert abs(plain - off).max() < 1e-6  # B·A times 0 is added to every layer's output


def test_wrong_family_and_no_adapter_are_refused_in_one_line(folders, tmp_path):
    with pytest.raises(UserError, match="sdxl") as found, personalize.attach(tiny("sdxl").pipeline(), folders["sd1"]):
        pass
    assert "\n" not in str(found.value)
    with pytest.raises(UserError, match="no adapter folder"), personalize.attach(tiny("sd1").pipeline(), tmp_path):
        pass
