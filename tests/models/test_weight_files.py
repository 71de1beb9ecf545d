"""Weight files that were not downloaded, lack a weight, or are of another kind of model, are refused by name."""

import pytest
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from personalize.errors import UserError
from personalize.models.stable_diffusion import StableDiffusion
from tests.support.tiny import tiny_folder, tiny_pipeline


def without_one_weight(file, ending):
    """Rewrite a weight file without the first of its weights whose name ends so; returns that name."""
    tensors = load_file(file)
    name = next(name for name in sorted(tensors) if name.endswith(ending))
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, file, {"format": "pt"})
    return name


@pytest.mark.parametrize(
    ("part", "file", "ending"),
    [
        ("unet", "diffusion_pytorch_model", "conv_in.weight"),
        ("vae", "diffusion_pytorch_model", "decoder.conv_out.bias"),
        ("text_encoder", "model", "self_attn.q_proj.weight"),  # transformers drew it at random, and went on
    ],
)
def test_a_folder_that_lacks_a_weight_is_refused_by_its_name(part, file, ending, tmp_path):
    folder = tiny_folder("sd1", tmp_path)
    name = without_one_weight(folder / part / f"{file}.safetensors", ending).removeprefix("text_model.")
    with pytest.raises(UserError, match=rf"its {part} lacks 1 weight\(s\), first .*{name}: get it again"):
        StableDiffusion.load(folder, device="cpu")


FAILED_DOWNLOADS = {
    b"": "is empty",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n": "is a pointer of Git LFS.*git lfs pull",
    b"<!DOCTYPE html><html><head></head></html>": "is a text that begins '<!DOCTYPE html>",
}


@pytest.mark.parametrize("content", FAILED_DOWNLOADS)
def test_what_a_failed_download_left_of_a_weight_file_is_named(content, tmp_path):
    folder = tiny_folder("sd1", tmp_path)
    file = folder / "text_encoder" / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(UserError, match=rf"text_encoder.model\.safetensors {FAILED_DOWNLOADS[content]}"):
        StableDiffusion.load(folder, device="cpu")
    (single := tmp_path / "single.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=rf"single\.safetensors {FAILED_DOWNLOADS[content]}"):
        StableDiffusion.load(single, device="cpu")


def test_pointers_in_place_of_weights_that_are_not_wanted_do_no_harm(tmp_path):
    """Someone who pulled the fp16 files alone could not use them: all files were opened."""
    tiny_pipeline("sd1").save_pretrained(tmp_path, variant="fp16")
    for part, name in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        (tmp_path / part / f"{name}.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    (tmp_path / "unet" / "pytorch_lora_weights.safetensors").write_bytes(b"")  # no file of the base
    assert StableDiffusion.load(tmp_path, variant="fp16", device="cpu").family == "sd1"


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (
            {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 16},
            "class_embed_type: projection",
        ),
        ({"num_class_embeds": 10}, "num_class_embeds: 10"),
        ({"encoder_hid_dim_type": "text_proj", "encoder_hid_dim": 32}, "encoder_hid_dim_type: text_proj"),
    ],
)
def test_a_base_whose_unet_reads_more_than_a_prompt_is_refused(settings, named, tmp_path):
    """Those of unCLIP and Kolors: the first prediction ended in a ValueError, or was another model's."""
    folder = tiny_folder("sd1", tmp_path)
    unet = UNet2DConditionModel.from_config(tiny_pipeline("sd1").unet.config, **settings)
    unet.save_pretrained(folder / "unet")
    with pytest.raises(UserError, match=rf"reads more than a prompt \({named}\)"):
        StableDiffusion.load(folder, device="cpu")
