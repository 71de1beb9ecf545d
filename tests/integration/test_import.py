"""Import: files that other programs made are edited with, and draw what a stock diffusers pipeline draws with them."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from personalize.adapters.adapter import Adapter
from personalize.editing.config import Sampling
from personalize.editing.editor import Editor
from personalize.errors import UserError
from personalize.formats import foreign_files, lora_files
from personalize.sampling.denoise import initial_latents
from tests.support.foreign_files import diffusers, kohya, save, with_uneven_ranks
from tests.support.lora_states import ATTENTION, paths, random_lora, text_lora
from tests.support.tiny import tiny

SHORT = Sampling(steps=3, guidance_scale=3.0)
PROMPT = "a photo of a cat on the beach"


def stock(model, prepare, prompt=PROMPT):
    """The picture of a stock pipeline after `prepare(pipe)`, from the same noise."""
    pipe = model.pipeline()
    prepare(pipe)
    pipe.scheduler = DDIMScheduler.from_config(model.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    noise = initial_latents(model, [0], (model.resolution, model.resolution))
    size = {"height": model.resolution, "width": model.resolution}
    options = {"num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "pil"}
    return pipe(prompt, latents=noise, **options, **size).images[0]


def drawn(model, file, prompt=PROMPT):
    return Editor(model, Adapter.load(file)).edit(prompt, sampling=SHORT)[0]


def off(one, other):
    return int(np.abs(np.asarray(one, np.int16) - np.asarray(other, np.int16)).max())


@pytest.mark.parametrize("name", ["sd1", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_a_kohya_file_with_text_encoders_draws_what_diffusers_draws(tmp_path, name):
    """One level of 255 is a rounding of the last bit."""
    model = tiny(name)
    state = random_lora(paths(model.unet, ATTENTION)) | text_lora(model)
    file = save(tmp_path / "kohya.safetensors", kohya(state, model.family, 2.0))
    weights = [parameter.clone() for encoder in model.text_encoders for parameter in encoder.parameters()]
    found = drawn(model, file)
    after = [parameter for encoder in model.text_encoders for parameter in encoder.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(weights, after, strict=True))
    expected = stock(tiny(name), lambda pipe: pipe.load_lora_weights(tmp_path, weight_name=file.name))
    base = stock(tiny(name), lambda pipe: None)
    without = save(
        tmp_path / "unet.safetensors", kohya({k: v for k, v in state.items() if "unet." in k}, model.family, 2.0)
    )
    assert off(found, expected) <= 1 and off(found, base) > 20 and off(found, drawn(model, without)) > 2


def test_uneven_and_mixed_files_are_edited_with_rightly(tmp_path):
    model = tiny("sd1")
    state = random_lora(paths(model.unet, lambda path: ATTENTION(path) or path == "conv_in"))
    cut, alphas, _ = with_uneven_ranks(state)
    file = save(tmp_path / "uneven.safetensors", kohya(cut, "sd1", alphas))
    lora = foreign_files.read_adapter_file(file)
    (tmp_path / "even.safetensors").write_bytes(lora_files.diffusers_file(lora.state, lora.alpha))
    expected = stock(tiny("sd1"), lambda pipe: pipe.load_lora_weights(tmp_path, weight_name="even.safetensors"))
    assert off(drawn(model, file), expected) <= 1
    mixed = save(tmp_path / "mixed.safetensors", diffusers(state, attention_only=True))
    (tmp_path / "pure.safetensors").write_bytes(lora_files.diffusers_file(state, 4.0))
    expected = stock(tiny("sd1"), lambda pipe: pipe.load_lora_weights(tmp_path, weight_name="pure.safetensors"))
    assert off(drawn(model, mixed), expected) <= 1


def test_an_embedding_of_the_graphical_programs_draws_what_diffusers_draws(tmp_path):
    model, rows = tiny("sd1"), torch.randn(2, 32) * 0.5
    file = save(tmp_path / "toy.safetensors", {"emb_params": rows})
    assert list(Adapter.load(file).concepts) == ["<toy>"]
    prompt = "a photo of <toy> on the beach"
    expected = stock(tiny("sd1"), lambda pipe: pipe.load_textual_inversion({"<toy>": rows}), prompt)
    assert off(drawn(model, file, prompt), expected) <= 1
    assert off(expected, stock(tiny("sd1"), lambda pipe: None, prompt)) > 2


def test_files_for_other_models_are_refused_in_one_line(tmp_path):
    model = tiny("sd1")
    lora = save(tmp_path / "xl.safetensors", kohya(random_lora(paths(tiny("sdxl").unet, ATTENTION)), "sdxl", 4.0))
    wide = save(tmp_path / "wide.safetensors", {"emb_params": torch.ones(1, 768)})
    dora = save(tmp_path / "dora.safetensors", {"lora_unet_conv_in.dora_scale": torch.ones(4)})
    with pytest.raises(UserError, match="sdxl"):
        drawn(model, lora)
    with pytest.raises(UserError, match="another base model|needs"):
        drawn(model, wide)
    with pytest.raises(UserError, match="DoRA"):
        Adapter.load(dora)
