"""The model that ships with the package: a stock folder that an unmodified pipeline loads, offline, and draws with."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from personalize.adapters.lora import module_names
from personalize.cli.launch import load_script, scripts_home
from personalize.embedded.scenes import HELD_OUT_STYLE, NOUNS
from personalize.models.stable_diffusion import EMBEDDED, StableDiffusion


@pytest.fixture(scope="module")
def pipe():
    """Loaded without a dtype; the fixture `no_network` is on, so nothing can be fetched."""
    pipe = StableDiffusionPipeline.from_pretrained(EMBEDDED)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_it_is_small_and_in_shards():
    weights = list(EMBEDDED.rglob("*.safetensors"))
    assert max(path.stat().st_size for path in weights) <= 15 * 2**20
    assert sum(path.stat().st_size for path in EMBEDDED.rglob("*") if path.is_file()) <= 45 * 2**20


def test_precisions_on_disk_are_what_transformers_and_diffusers_can_load_together():
    assert json.loads((EMBEDDED / "text_encoder" / "config.json").read_text())["dtype"] == "float32"
    from safetensors import safe_open

    for part, dtype in (("unet", "F16"), ("vae", "F16"), ("text_encoder", "F32")):
        for path in (EMBEDDED / part).glob("*.safetensors"):
            with safe_open(path, "pt") as file:
                assert {file.get_slice(name).get_dtype() for name in file.keys()} == {dtype}  # noqa: SIM118


def test_an_unmodified_pipeline_draws_with_it(pipe):
    images = pipe("a cat on a red background", num_inference_steps=2, output_type="np").images
    assert images.shape == (1, 128, 128, 3) and np.isfinite(images).all() and images.std() > 0.01


def test_it_has_the_topology_it_promises(pipe):
    assert len(module_names(pipe.unet, "sd1")) == 216
    assert pipe.scheduler.config.prediction_type == "epsilon" and pipe.scheduler.config.steps_offset == 1
    assert pipe.vae.config.latent_channels == 4 and pipe.vae_scale_factor == 4
    assert len(pipe.tokenizer) <= 2000 and pipe.tokenizer.model_max_length == 77
    model = StableDiffusion.from_pipeline(pipe)
    assert (model.family, model.resolution, model.factor) == ("sd1", 128, 4)


def test_its_text_encoder_knows_its_own_marks(pipe):
    config, tokenizer = pipe.text_encoder.config, pipe.tokenizer
    marks = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == marks
    assert tokenizer.tokenize("a picture of a cat on the beach") == [
        f"{word}</w>" for word in "a picture of a cat on the beach".split()
    ]


def test_training_can_go_on_from_it(pipe):
    script = load_script(scripts_home() / "train" / "embedded_model.py")
    objective = script.networks(EMBEDDED)
    assert objective.unet.dtype == torch.float32, "half precision cannot be trained on"
    for ours, theirs in ((objective.unet, pipe.unet), (objective.text_encoder, pipe.text_encoder)):
        weights = theirs.state_dict()
        assert all(torch.equal(value.float(), weights[name].float()) for name, value in ours.state_dict().items())


def test_it_is_the_default_base():
    model = StableDiffusion.load(device="cpu")
    assert model.name == "embedded" and model.dtype == torch.float32
    assert model.unet.conv_in.weight.requires_grad is False


def test_what_it_knows_is_written_down():
    world = json.loads((EMBEDDED / "world.json").read_text())
    assert set(world["nouns"]) <= set(NOUNS) and len(world["nouns"]) >= 24
    assert HELD_OUT_STYLE not in world["styles"] and len(world["backgrounds"]) >= 20
