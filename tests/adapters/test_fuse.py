"""Merged bases: stock diffusers and our own loader read them, and draw what the adapter draws at run time."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors import safe_open

from personalize.adapters import fuse
from personalize.adapters.adapter import Adapter
from personalize.adapters.fuse import export_folder, export_single_file, has_published_sizes, merged_weights
from personalize.errors import UserError
from personalize.formats import lora_keys
from personalize.models import loading
from personalize.models.loading import checkpoint_kind
from personalize.models.stable_diffusion import StableDiffusion
from tests.support.lora_predictions import difference
from tests.support.lora_states import EVERYTHING, paths, predict, predict_with_delta, random_lora, text_lora
from tests.support.tiny import tiny, tiny_folder

CLOSE = 1e-5  # of the output's scale: merged weights and a LoRA branch add the same products in another order, in fp32
CLOSE_FP16 = 1e-2  # every weight rounded to 2⁻¹¹, through twenty-odd layers
KINDS = {"sd1": "sd15", "sd2v": "sd21v", "sdxl": "sdxl"}


def with_attention(model):
    """`model` with an autoencoder like the published ones, with attention in the middle."""
    config = {**model.vae.config, "mid_block_add_attention": True}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.vae = AutoencoderKL.from_config(config).requires_grad_(False).eval()
    return model


@pytest.fixture
def tiny_configs(tmp_path, monkeypatch):
    """The shipped configurations with the sizes of the tiny models, and their tokenizers."""

    def shrink(name, model):
        shutil.copytree(model_folder(name, model, tmp_path), tmp_path / "configs" / KINDS[name])

    monkeypatch.setattr(loading, "CONFIGS", tmp_path / "configs")
    monkeypatch.setattr(loading, "clip_tokenizer", lambda pad="": tiny("sd1").tokenizers[0])
    return shrink


def model_folder(name, model, place):
    folder = place / f"saved-{name}"
    model.pipeline().save_pretrained(folder)
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    return folder


def make(model, want=EVERYTHING):
    lora = random_lora(paths(model.unet, want)) | text_lora(model)
    return Adapter(lora, 4, 6.0, None, {"base": {**model.identity, "prediction_type": model.prediction_type}})


@pytest.mark.parametrize("name", ["sd1", pytest.param("sd2v", marks=pytest.mark.slow), "sdxl"])
def test_a_single_file_draws_what_the_adapter_draws(name, tmp_path, tiny_configs):
    model = with_attention(tiny(name))
    adapter = make(model)
    tiny_configs(name, model)
    before = predict(model)
    file = export_single_file(model, merged_weights(model, adapter), tmp_path / "m.safetensors")
    assert torch.equal(predict(model), before)  # the model at hand is as it was
    assert checkpoint_kind(file)[0] == KINDS[name]
    loaded = StableDiffusion.load(file, device="cpu")
    assert loaded.prediction_type == model.prediction_type
    latents = torch.linspace(-1, 1, 4 * 16 * 16).reshape(1, 4, 16, 16)
    assert torch.equal(loaded.decode(latents), model.decode(latents))
    expected = predict_with_delta(model, adapter)
    assert difference(before, expected) > 0.01 and difference(predict(loaded), expected) < CLOSE
    cls = StableDiffusionXLPipeline if name == "sdxl" else StableDiffusionPipeline
    tokenizers = {"tokenizer": model.tokenizers[0]} | ({"tokenizer_2": model.tokenizers[1]} if name == "sdxl" else {})
    pipe = cls.from_single_file(
        str(file), config=str(loading.CONFIGS / KINDS[name]), local_files_only=True, **tokenizers
    )
    assert difference(predict(StableDiffusion.from_pipeline(pipe)), expected) < CLOSE


@pytest.mark.parametrize("name", ["sd1", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sd2v", "sdxl"))])
def test_a_folder_draws_what_the_adapter_draws(name, tmp_path):
    model = tiny(name)
    adapter = make(model, lambda path: path.endswith((".to_k", ".conv1")))
    weights = merged_weights(model, adapter)
    folder = export_folder(model, weights, tmp_path / "model")
    half = export_folder(model, weights, tmp_path / "half", torch.float16)
    expected = predict_with_delta(tiny(name), adapter)
    assert difference(predict(StableDiffusion.load(folder, device="cpu")), expected) < CLOSE
    pipe = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    assert difference(predict(StableDiffusion.from_pipeline(pipe)), expected) < CLOSE
    assert difference(predict(StableDiffusion.load(half, device="cpu", dtype=torch.float32)), expected) < CLOSE_FP16
    with safe_open(half / "text_encoder" / "model.safetensors", "pt") as file:
        keys = list(file.keys())
        assert all(key.startswith("text_model.") for key in keys)  # also for older transformers
        assert {str(file.get_tensor(key).dtype) for key in keys} == {"torch.float16"}
    assert json.loads((half / "text_encoder" / "config.json").read_text())["dtype"] == "float16"
    assert not any(str(tmp_path) in path.read_text("utf-8") for path in folder.rglob("*.json"))
    reference = tiny_folder(name, tmp_path / "stock")
    names = {path.relative_to(reference).as_posix() for path in reference.rglob("*") if path.is_file()}
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == names


def test_v_prediction_is_said_where_it_can_be(tmp_path):
    model = tiny("sdxl")
    model.prediction_type = "v_prediction"
    model.scheduler.register_to_config(rescale_betas_zero_snr=True)
    file = export_single_file(model, fuse.component_weights(model), tmp_path / "xl.safetensors")
    assert checkpoint_kind(file) == ("sdxl", {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True})
    model = tiny("sd1")
    model.prediction_type = "v_prediction"
    with pytest.raises(UserError, match="export a folder"):
        export_single_file(model, fuse.component_weights(model), tmp_path / "sd1.safetensors")
    model = tiny("sd2v")
    model.prediction_type = "epsilon"
    file = export_single_file(model, fuse.component_weights(model), tmp_path / "sd2.safetensors")
    assert checkpoint_kind(file) == ("sd21", {}) and not has_published_sizes(model)


@pytest.mark.parametrize(("layers", "published"), [(12, True), (11, False)])
def test_a_text_encoder_without_its_last_layer_is_of_no_published_size(layers, published):
    """Bases for clip skip have one layer less; programs would fill the twelfth of a single file at random."""
    unet = SimpleNamespace(config=SimpleNamespace(block_out_channels=(320, 640), cross_attention_dim=768))
    encoder = SimpleNamespace(config=SimpleNamespace(num_hidden_layers=layers))
    model = SimpleNamespace(family="sd1", unet=unet, text_encoders=(encoder,))
    assert has_published_sizes(model) is published


@pytest.mark.parametrize("changes", [{"rescale_betas_zero_snr": True}, {"beta_end": 0.02}, {"beta_schedule": "linear"}])
def test_a_noise_schedule_that_a_single_file_cannot_say_is_not_lost(tmp_path, changes):
    """The file was written, and read with the usual schedule by every program."""
    model = tiny("sd2v")
    model.scheduler.register_to_config(**changes)
    with pytest.raises(UserError, match="noise schedule .* export a folder instead"):
        export_single_file(model, fuse.component_weights(model), tmp_path / "sd2.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("writer", [export_single_file, export_folder])
def test_what_is_not_right_never_appears(tmp_path, monkeypatch, writer):
    model = tiny("sd1")
    weights = fuse.component_weights(model)
    spoilt = {**weights["unet"], "conv_in.bias": weights["unet"]["conv_in.bias"] + 1e-3}
    parts = fuse.tensor_parts

    def wrong(tensors, *rest):
        swap = {"conv_in.bias", "model.diffusion_model.input_blocks.0.0.bias"} & set(tensors)
        return parts({**tensors, **dict.fromkeys(swap, spoilt["conv_in.bias"])}, *rest)

    monkeypatch.setattr(fuse, "tensor_parts", wrong)
    with pytest.raises(UserError, match="unet comes back with another conv_in.bias"):
        writer(model, weights, tmp_path / "out.safetensors", torch.float32)
    assert not list(tmp_path.iterdir())


def test_a_wrong_name_is_found(tmp_path, monkeypatch):
    monkeypatch.setitem(lora_keys.ORIGINAL_RESNET, "norm1", "in_layers.1")
    model = tiny("sd1")
    with pytest.raises(UserError, match="does not verify: unet"):
        export_single_file(model, fuse.component_weights(model), tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())


def test_what_does_not_fit_is_refused(tmp_path):
    model, other = tiny("sd1"), tiny("sdxl")
    adapter = make(model, lambda path: path.endswith("to_k"))
    wide = {key: torch.cat([tensor, tensor]) if "lora_B" in key else tensor for key, tensor in adapter.lora.items()}
    strange = {key.replace("down_blocks.0", "down_blocks.9"): tensor for key, tensor in adapter.lora.items()}
    large = fuse.component_weights(model)
    large["vae"]["encoder.conv_in.bias"] = torch.full((8,), 1e6)
    for attempt, message in (
        (lambda: merged_weights(other, adapter), "not for tiny-sdxl"),
        (lambda: merged_weights(model, replace(adapter, lora=wide)), "name its own"),
        (lambda: merged_weights(model, replace(adapter, lora=strange)), "no such module"),
        (lambda: export_folder(model, large, tmp_path / "x", torch.float16), "vae's encoder.conv_in.bias does not fit"),
    ):
        with pytest.raises(UserError, match=message):
            attempt()
    with adapter.apply(model), pytest.raises(UserError, match="has an adapter already"):
        fuse.component_weights(model)
