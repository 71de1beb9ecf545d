import json
import shutil

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from personalize.adapters.lora import module_names
from personalize.errors import Notice, UserError
from personalize.models import loading
from personalize.models.config import EMBEDDED, base_name
from personalize.models.loading import CONFIGS, checkpoint_kind, clip_tokenizer
from personalize.models.stable_diffusion import StableDiffusion
from tests.support.original_layout import original_layout
from tests.support.tiny import tiny, tiny_folder, tiny_inpainting_pipeline, tiny_pipeline

KINDS = {"sd1": "sd15", "sd2v": "sd21v", "sdxl": "sdxl"}


def parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("kind", "unet", "text", "modules"),
    [
        ("sd15", 859_520_964, 123_060_480, 216),
        ("sd21", 865_910_724, 340_387_840, 216),
        ("sd21v", 865_910_724, 340_387_840, 216),
        ("sdxl", 2_567_463_684, 123_060_480, 661),
    ],
)
def test_shipped_configs_have_the_published_parameter_counts(kind, unet, text, modules):
    with torch.device("meta"):
        built = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(CONFIGS / kind / "unet"))
        assert parameters(built) == unet and len(module_names(built)) == modules
        assert parameters(AutoencoderKL.from_config(AutoencoderKL.load_config(CONFIGS / kind / "vae"))) == 83_653_863
        assert parameters(CLIPTextModel(CLIPTextConfig.from_pretrained(CONFIGS / kind / "text_encoder"))) == text
        if kind == "sdxl":
            config = CLIPTextConfig.from_pretrained(CONFIGS / kind / "text_encoder_2")
            assert parameters(CLIPTextModelWithProjection(config)) == 694_659_840


def test_clip_tokenizer_gives_the_published_numbers():
    tokenizer = clip_tokenizer()
    assert len(tokenizer) == 49_408
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert tokenizer("Hello, WORLD!").input_ids == [49406, 3306, 267, 1002, 256, 49407]
    padded = clip_tokenizer("!")("a cat", padding="max_length", max_length=6).input_ids
    assert padded == [49406, 320, 2368, 49407, 0, 0]
    assert tokenizer("a cat", padding="max_length", max_length=6).input_ids[-2:] == [49407, 49407]


@pytest.fixture
def tiny_configs(tmp_path, monkeypatch):
    """Shipped configs with the sizes of the tiny models, and their tokenizers."""
    for name, kind in KINDS.items():
        folder = tiny_folder(name, tmp_path / "saved")
        for part in folder.glob("**/*.json"):
            target = tmp_path / "configs" / kind / part.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(part, target)
    monkeypatch.setattr(loading, "CONFIGS", tmp_path / "configs")
    monkeypatch.setattr(loading, "clip_tokenizer", lambda pad="": tiny("sd1").tokenizers[0])
    return tmp_path


@pytest.mark.parametrize("name", KINDS)
def test_a_single_file_gives_the_same_model_as_the_folder(name, tiny_configs):
    model = tiny(name)
    file = tiny_configs / f"{name}.safetensors"
    save_file(original_layout(model), file)
    assert checkpoint_kind(file)[0] == KINDS[name]
    loaded = StableDiffusion.load(file, device="cpu")
    assert (loaded.family, loaded.prediction_type) == (model.family, model.prediction_type)
    assert loaded.identity["sha256"] == model.identity["sha256"]
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    for text in (["a cat"], [""]):
        ours, expected = loaded.prompts(text), model.prompts(text)
        torch.testing.assert_close(ours.embeds, expected.embeds)
        torch.testing.assert_close(loaded.predict(latents, 9, ours), model.predict(latents, 9, expected))
    torch.testing.assert_close(loaded.decode(latents), model.decode(latents))


@pytest.mark.parametrize("name", KINDS)
def test_a_single_file_of_an_inpainting_model_is_loaded_where_it_is_wanted(name, tiny_configs):
    model = StableDiffusion.from_pipeline(tiny_inpainting_pipeline(name))
    file = tiny_configs / f"{name}.safetensors"
    save_file(original_layout(model), file)
    with pytest.raises(UserError, match=f"{name}.safetensors is an inpainting model"):
        StableDiffusion.load(file, device="cpu")
    loaded = StableDiffusion.load(file, device="cpu", inpainting=True)
    assert loaded.inpainting and loaded.identity["sha256"] == model.identity["sha256"]
    assert (loaded.family, loaded.resolution) == (model.family, model.resolution)


def test_a_unet_of_other_input_channels_is_refused_everywhere(tiny_configs):
    """Eight are those of InstructPix2Pix, which reads a picture but no mask."""
    first = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(8, 8)}
    save_file(first | {"cond_stage_model.transformer.x": torch.zeros(1)}, file := tiny_configs / "p2p.safetensors")
    for wanted in (False, True):
        with pytest.raises(UserError, match="p2p.safetensors has 8 input channels: text-to-image models have 4"):
            StableDiffusion.load(file, device="cpu", inpainting=wanted)


@pytest.mark.parametrize(("given", "found", "side"), [(None, "epsilon", 64), ("v_prediction", None, 96)])
def test_a_silent_sd2_file_is_what_its_unet_predicts_or_what_the_option_says(
    given, found, side, tiny_configs, monkeypatch
):
    for kind, size in (("sd21", 64), ("sd21v", 96)):
        source, target = (tiny_configs / "configs" / name / "unet" / "config.json" for name in ("sd21v", kind))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(json.loads(source.read_text()) | {"sample_size": size}))
    file = tiny_configs / "silent.safetensors"
    save_file(original_layout(tiny("sd2v")), file)
    monkeypatch.setattr(loading, "predicted_quantity", lambda *_: found or pytest.fail("looked in spite of the option"))
    model = StableDiffusion.load(file, device="cpu", prediction_type=given)
    assert (model.prediction_type, model.unet.config.sample_size) == (given or found, side)


def header(path, keys, metadata=None):
    tensors = {key: torch.zeros(1) for key in keys} | {
        "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(8, 4)
    }
    save_file(tensors, path, metadata)
    return path


def test_a_base_that_takes_the_guidance_scale_as_an_embedding_is_refused(tmp_path):
    """The UNets of distilled LCM bases: without the embedding, and guided in two passes, they drew something else."""
    folder = tiny_folder("sd1", tmp_path)
    pipe = tiny_pipeline("sd1")
    unet = UNet2DConditionModel.from_config(pipe.unet.config, time_cond_proj_dim=16)
    unet.save_pretrained(folder / "unet")
    with pytest.raises(UserError, match="guidance scale as an embedding"):
        StableDiffusion.load(folder, device="cpu")


def test_a_base_with_a_tiny_autoencoder_is_refused_and_a_pipeline_with_one_can_borrow_adapters(tmp_path):
    pipe = tiny_pipeline("sd1")
    pipe.vae = AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4)
    assert StableDiffusion.from_pipeline(pipe).prompts(["a cat"]).embeds.isfinite().all()
    pipe.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=".AutoencoderTiny. gives no distribution of latents: give a base with an Auto"):
        StableDiffusion.load(tmp_path, device="cpu")


def test_weights_that_are_there_in_one_variant_alone_are_named(tmp_path):
    folder = tiny_folder("sd1", tmp_path)
    tiny_pipeline("sd1").save_pretrained(tmp_path / "half", variant="fp16")
    with pytest.raises(UserError, match="its unet as variant fp16 alone: add --variant fp16"):
        StableDiffusion.load(tmp_path / "half", device="cpu")
    assert StableDiffusion.load(tmp_path / "half", variant="fp16", device="cpu").family == "sd1"
    shutil.copy(tmp_path / "half" / "unet" / "diffusion_pytorch_model.fp16.safetensors", folder / "unet")
    assert StableDiffusion.load(folder, device="cpu").family == "sd1"  # both are there
    plain = folder / "text_encoder" / "model.safetensors"
    plain.rename(plain.with_name("model.fp16.safetensors"))
    with pytest.raises(UserError, match="its text_encoder as variant fp16 alone: add --variant fp16"):
        StableDiffusion.load(folder, device="cpu")


def test_the_refiner_is_named(tmp_path):
    folder = tiny_folder("sdxl", tmp_path)
    index = json.loads((folder / "model_index.json").read_text())
    index |= {
        "_class_name": "StableDiffusionXLImg2ImgPipeline",
        "text_encoder": [None, None],
        "tokenizer": [None, None],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="is an SDXL refiner"):
        StableDiffusion.load(folder, device="cpu")


def test_kinds_are_read_off_names_and_metadata(tmp_path):
    file = tmp_path / "base.safetensors"
    open_clip, xl = "cond_stage_model.model.ln_final.weight", "conditioner.embedders.1.model.ln_final.weight"
    assert checkpoint_kind(header(file, ["cond_stage_model.transformer.x"])) == ("sd15", {})
    assert checkpoint_kind(header(file, [open_clip])) == ("sd21v", {})
    assert checkpoint_kind(header(file, [open_clip], {"modelspec.prediction_type": "epsilon"})) == ("sd21", {})
    assert checkpoint_kind(header(file, [xl])) == ("sdxl", {})
    zero_snr = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    assert checkpoint_kind(header(file, [xl, "v_pred", "ztsnr"])) == ("sdxl", zero_snr)


@pytest.mark.parametrize("wrong", ["pickle", "text", "truncated", "lora", "inpainting", "other"])
def test_other_files_are_refused_in_one_line(wrong, tmp_path):
    file = tmp_path / ("base.ckpt" if wrong == "pickle" else "base.safetensors")
    if wrong in ("pickle", "text"):
        file.write_text("no tensors here")
    elif wrong == "truncated":
        header(file, ["cond_stage_model.transformer.x"])
        file.write_bytes(file.read_bytes()[:100])
    elif wrong == "lora":
        save_file({"lora_unet_x.lora_down.weight": torch.zeros(1)}, file)
    elif wrong == "inpainting":
        first = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(8, 9)}
        save_file(first | {"cond_stage_model.transformer.x": torch.zeros(1)}, file)
    else:
        header(file, ["conditioner.embedders.0.model.ln_final.weight"])
    with pytest.raises(UserError) as caught:
        StableDiffusion.load(file, device="cpu")
    assert "\n" not in str(caught.value) and "base." in str(caught.value)


def test_shipped_configs_are_the_four_and_valid():
    assert {path.name for path in CONFIGS.iterdir() if path.is_dir()} == {"clip", "sd15", "sd21", "sd21v", "sdxl"}
    assert all(json.loads(path.read_text()) for path in CONFIGS.rglob("*.json"))
    assert sum(path.stat().st_size for path in CONFIGS.rglob("*") if path.is_file()) < 1_000_000


def test_the_packages_own_base_is_known_by_its_path_too(tmp_path):
    """In a pipeline, or named by its folder, it had the guidance and the settings of the published bases."""
    (tmp_path / "link").symlink_to(EMBEDDED)
    assert [base_name(str(path)) for path in (EMBEDDED, tmp_path / "link")] == ["embedded", "embedded"]
    pipe = tiny_pipeline("sd1")
    assert StableDiffusion.from_pipeline(pipe, str(EMBEDDED)).name == "embedded"
    others = ["", "owner/name", str(EMBEDDED.parent), str(tmp_path)]
    assert [base_name(other) for other in others] == others


@pytest.mark.parametrize(
    ("more", "less", "says"),
    [
        ("time_embed.cond_proj.weight", "", "1 weight.s. that no model of its family has, first .*cond_proj"),  # LCM
        ("label_emb.0.0.weight", "", "1 weight.s. that no model of its family has, first .*label_emb"),  # unCLIP
        ("middle_block.1.transformer_blocks.0.fuser.linear.weight", "", "first .*fuser"),  # GLIGEN
        ("", "middle_block.0.in_layers.2.weight", "lacks 1 weight.s. .* first mid_block.resnets.0.conv1.weight"),
    ],
)
def test_a_single_file_with_a_unet_of_another_kind_is_refused(more, less, says, tiny_configs):
    """What the family's UNet has no place for was dropped, and the rest drew something else."""
    state, prefix = original_layout(tiny("sd1")), "model.diffusion_model."
    state |= {prefix + more: torch.zeros(4, 4)} if more else {}
    state.pop(prefix + less, None)
    save_file(state, file := tiny_configs / "other.safetensors")
    with pytest.raises(UserError, match=says) as caught:
        StableDiffusion.load(file, device="cpu")
    assert "the UNet of other.safetensors" in str(caught.value)


def test_what_a_merge_left_beside_the_unets_blocks_is_not_used_and_said(tiny_configs):
    state = original_layout(tiny("sd1")) | {"model.diffusion_model.merge_recipe": torch.zeros(3)}
    save_file(state, file := tiny_configs / "merge.safetensors")
    with pytest.warns(Notice, match=r"merge.safetensors: 1 tensor\(s\) beside the UNet's blocks.*merge_recipe"):
        assert StableDiffusion.load(file, device="cpu").family == "sd1"


@pytest.mark.parametrize("name", ["cond_stage_model.transformer.text_model.x.scale_weight", "scaled_fp8"])
def test_a_single_file_whose_numbers_are_to_be_scaled_is_refused(name, tiny_configs):
    """ComfyUI's scaled fp8: without the factors the text encoder was another."""
    save_file(original_layout(tiny("sd1")) | {name: torch.ones(1)}, file := tiny_configs / "fp8.safetensors")
    with pytest.raises(UserError, match=rf"fp8.safetensors is quantized, .*{name}"):
        StableDiffusion.load(file, device="cpu")
