"""The original checkpoint layout: diffusers' own converters must turn our files back into exactly the same model."""

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from personalize.adapters.fuse import component_weights
from personalize.errors import UserError
from personalize.formats.original_checkpoint import (
    TEXT_ENCODER_PREFIXES,
    UNET_PREFIX,
    VAE_PREFIX,
    original_state,
    unet_name,
)
from personalize.formats.reader_keys import original_paths
from personalize.io.atomic import write_file
from personalize.io.tensor_files import tensor_parts
from personalize.models.empty import empty_unet
from personalize.models.loading import CONFIGS
from personalize.models.stable_diffusion import StableDiffusion
from tests.support.original_layout import original_layout
from tests.support.tiny import tiny

PUBLISHED = {  # tensors of the UNet, the autoencoder and the text encoders in the published files, buffers left out
    "sd15": ("sd1", 686, 248, {"cond_stage_model.transformer.": 196}),
    "sd21v": ("sd2", 686, 248, {"cond_stage_model.model.": 23 * 12 + 4}),  # without the last layer, which is unused
    "sdxl": ("sdxl", 1680, 248, {"conditioner.embedders.0.transformer.": 196, "conditioner.embedders.1.model.": 389}),
}


def meta(kind):
    """Full-size networks of a shipped configuration, on the meta device."""
    folder, classes = CONFIGS / kind, {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    with torch.device("meta"):
        modules = {"unet": UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet"))}
        modules["vae"] = AutoencoderKL.from_config(AutoencoderKL.load_config(folder / "vae"))
        for name in TEXT_ENCODER_PREFIXES[PUBLISHED[kind][0]]:
            modules[name] = classes[name](CLIPTextConfig.from_pretrained(folder / name))
    return modules


def named(name, module):
    def key(path):
        nested = name in ("unet", "vae") or path.startswith(("text_model.", "text_projection"))
        return path if nested else f"text_model.{path}"

    return {key(path): tensor for path, tensor in module.state_dict().items()}


@pytest.mark.parametrize("kind", PUBLISHED)
def test_full_size_models_translated_to_the_original_layout_and_back_are_unchanged(kind):
    family, unet, vae, text = PUBLISHED[kind]
    modules = meta(kind)
    state = original_state({name: named(name, module) for name, module in modules.items()}, family)
    counts = {prefix: sum(key.startswith(prefix) for key in state) for prefix in (UNET_PREFIX, VAE_PREFIX, *text)}
    assert counts == {UNET_PREFIX: unet, VAE_PREFIX: vae} | text
    back = {
        "unet": convert_ldm_unet_checkpoint(state, config=dict(modules["unet"].config)),
        "vae": convert_ldm_vae_checkpoint(state, config=dict(modules["vae"].config)),
    }
    for name, (prefix, scheme) in TEXT_ENCODER_PREFIXES[family].items():
        open_clip = scheme == "open_clip"
        back[name] = (
            convert_open_clip_checkpoint(modules[name], state, prefix)
            if open_clip
            else convert_ldm_clip_checkpoint(state)
        )
    for name, module in modules.items():
        expected = {key: tensor.shape for key, tensor in named(name, module).items()}
        assert {key: tensor.shape for key, tensor in back[name].items()} == expected


@pytest.mark.parametrize("name", ["sd1", "sd2v", "sdxl"])
def test_names_and_values_equal_an_independent_implementation(name):
    model = tiny(name)
    ours, theirs = original_state(component_weights(model), model.family), original_layout(model)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_unet_names_equal_those_found_by_counting_blocks(family):
    unet = empty_unet(family)
    attending = {f"up_blocks.{i}" for i, block in enumerate(unet.up_blocks) if getattr(block, "attentions", None)}
    for theirs, ours in original_paths(unet).items():
        assert unet_name(f"{ours}.weight", attending) == f"{theirs}.weight"


def test_the_middle_attention_of_the_autoencoder_becomes_convolutions():
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    state = {f"first_stage_model.{key}": 0 for key in ("encoder.mid.attn_1.q.weight", "decoder.mid.attn_1.norm.bias")}
    found = original_state({"unet": {}, "vae": vae.state_dict(), "text_encoder": {}}, "sd1")
    assert state.keys() <= found.keys() and found["first_stage_model.encoder.mid.attn_1.proj_out.weight"].ndim == 4
    assert found["first_stage_model.encoder.mid.attn_1.q.bias"].ndim == 1
    back = convert_ldm_vae_checkpoint(found, config=dict(vae.config))
    assert all(torch.equal(back[key], tensor) for key, tensor in vae.state_dict().items())


def test_the_error_names_an_unknown_weight():
    with pytest.raises(UserError, match="encoder_hid_proj"):
        unet_name("encoder_hid_proj.weight", set())


@pytest.mark.slow
@pytest.mark.parametrize("kind", PUBLISHED)
def test_full_size_checkpoints_load_with_the_shipped_configurations(kind, tmp_path):
    """Through our own loader and diffusers' `from_single_file`; takes 9 GB of memory, 18 GB for SDXL."""
    draw = torch.Generator().manual_seed(0)
    weights = {
        name: {
            key: torch.empty(t.shape, dtype=torch.float16).uniform_(generator=draw) for key, t in named(name, m).items()
        }
        for name, m in meta(kind).items()
    }
    state = original_state(weights, PUBLISHED[kind][0])
    file = write_file(tmp_path / "model.safetensors", tensor_parts(state, {"format": "pt"}))
    del state
    for component, found in component_weights(StableDiffusion.load(file, device="cpu", dtype=torch.float16)).items():
        assert found.keys() == weights[component].keys()
        assert all(torch.equal(found[key].half(), tensor) for key, tensor in weights[component].items())
