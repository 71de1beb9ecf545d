import pytest
import torch

from personalize.errors import UserError
from personalize.models.loading import family
from personalize.models.stable_diffusion import Conditioning, StableDiffusion
from tests.support.tiny import NAMES, tiny, tiny_folder, tiny_pipeline, tiny_sd1, tiny_sd2v, tiny_sdxl

PROMPTS = ["a cat on the beach", "my red dog"]


def rows(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 4, 16, 16, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("name", "expected"), [("sd1", "sd1"), ("sd2v", "sd2"), ("sdxl", "sdxl")])
def test_families_are_told_apart_and_sizes_are_read_off(name, expected):
    model = tiny(name)
    assert (model.family, model.factor, model.resolution) == (expected, 4, 64)
    assert model.prediction_type == ("v_prediction" if name == "sd2v" else "epsilon")


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_loads_offline_and_predicts_what_was_saved(name, tmp_path, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was used"))
    saved = tiny(name)
    loaded = StableDiffusion.load(tiny_folder(name, tmp_path), device="cpu")
    assert loaded.identity["sha256"] == saved.identity["sha256"]
    assert not any(weight.requires_grad for weight in loaded.unet.parameters())
    conditioning, expected = loaded.prompts(PROMPTS), saved.prompts(PROMPTS)
    assert torch.equal(loaded.predict(rows(2), 500, conditioning), saved.predict(rows(2), 500, expected))


def test_half_precision_weights_become_fp32_on_the_cpu_and_keep_their_identity(tmp_path):
    pipe = tiny_pipeline("sd1")
    pipe.unet.half(), pipe.vae.half()
    pipe.save_pretrained(tmp_path / "half")
    full = StableDiffusion.load(tmp_path / "half", device="cpu")
    half = StableDiffusion.load(tmp_path / "half", device="cpu", dtype=torch.float16)
    assert (full.dtype, half.dtype) == (torch.float32, torch.float16)
    assert {full.vae.dtype, half.vae.dtype, half.text_encoders[0].dtype} == {torch.float32}
    assert full.identity["sha256"] == half.identity["sha256"]


def test_identity_tells_bases_apart():
    model, other = tiny_sd1(), tiny_sd1()
    with torch.no_grad():
        other.unet.conv_in.weight += 0.1
    assert model.identity["name"] == "tiny-sd1"
    assert model.identity != other.identity


@pytest.mark.parametrize("name", ["sd1", "sd2v"])
def test_prompts_equal_the_stock_pipelines(name):
    model = tiny(name)
    expected, null = model.pipeline().encode_prompt(PROMPTS, "cpu", 1, True)
    assert torch.equal(model.prompts(PROMPTS).embeds, expected)
    assert torch.equal(model.null(2).embeds, null)


@pytest.mark.parametrize("zeros", [True, False])
def test_sdxl_prompts_equal_the_stock_pipelines(zeros):
    pipe = tiny_pipeline("sdxl")
    pipe.register_to_config(force_zeros_for_empty_prompt=zeros)
    model = StableDiffusion.from_pipeline(pipe)
    embeds, null, pooled, null_pooled = pipe.encode_prompt(PROMPTS, device="cpu")
    ours, ours_null = model.prompts(PROMPTS, (48, 64)), model.null(2, (48, 64))
    assert torch.equal(ours.embeds, embeds) and torch.equal(ours.pooled, pooled)
    assert torch.equal(ours_null.embeds, null) and torch.equal(ours_null.pooled, null_pooled)
    assert ours.time_ids.tolist() == [[48, 64, 0, 0, 48, 64]] * 2


@pytest.mark.parametrize("make", [tiny_sd1, tiny_sd2v])
def test_split_target_and_noised_belong_together(make):
    """1e-5: fp32 rounding, divided by √ᾱ ≥ 0.07."""
    model, x0, noise, times = make(), rows(3), rows(3, 1), torch.tensor([3, 500, 990])
    z = model.noised(x0, noise, times)
    alpha = model.alphas_cumprod[times].view(-1, 1, 1, 1)
    clean, eps = model.split(model.target(x0, noise, times), z, alpha)
    torch.testing.assert_close(clean, x0, atol=1e-5, rtol=0)
    torch.testing.assert_close(eps, noise, atol=1e-5, rtol=0)
    torch.testing.assert_close(model.joined(x0, z, alpha), model.target(x0, noise, times), atol=1e-5, rtol=0)


def test_v_target_equals_the_stock_schedulers():
    """1e-6: the same formula in fp32."""
    model, x0, noise, times = tiny_sd2v(), rows(3), rows(3, 1), torch.tensor([3, 500, 990])
    stock = model.scheduler
    torch.testing.assert_close(model.target(x0, noise, times), stock.get_velocity(x0, noise, times), atol=1e-6, rtol=0)
    torch.testing.assert_close(model.noised(x0, noise, times), stock.add_noise(x0, noise, times), atol=1e-6, rtol=0)


def test_dpl_alphas_of_the_published_schedule():
    """Five digits, as printed in the specification; below timestep 0 the clean latents have ᾱ(0)."""
    model = tiny_sd1()
    found = [model.alpha(level) for level in (-19, 0, 1, 21, 981, 999)]
    assert found == pytest.approx([0.999150, 0.999150, 0.998296, 0.980381, 0.0057755, 0.0046601], rel=1e-4)


def test_pictures_become_scaled_latents_and_back():
    model = tiny_sd1()
    pixels = torch.rand(2, 3, 64, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = model.posterior(pixels)
    assert mean.shape == std.shape == (2, 4, 16, 12)
    assert torch.equal(model.encode(pixels), mean)
    raw = model.vae.encode(pixels).latent_dist.mean
    assert torch.equal(mean, raw * model.vae.config.scaling_factor)
    draw = model.encode(pixels, torch.Generator().manual_seed(1))
    assert torch.equal(draw, model.encode(pixels, torch.Generator().manual_seed(1))) and not torch.equal(draw, mean)
    decoded = model.decode(mean)
    assert decoded.shape == pixels.shape and decoded.abs().max() <= 1


def test_a_pipeline_shares_the_modules_and_a_handle_on_it_too():
    for name in NAMES:
        model = tiny(name)
        pipe = model.pipeline()
        assert pipe.unet is model.unet and pipe.vae is model.vae and pipe.scheduler is not model.scheduler
        assert StableDiffusion.from_pipeline(pipe).unet is model.unet


def test_conditioning_rows():
    model = tiny_sdxl()
    two = model.prompts(PROMPTS)
    four = two.repeat(2)
    assert (
        len(four) == 4 and torch.equal(four.embeds[1], two.embeds[0]) and torch.equal(four[2:3].pooled, two[1:2].pooled)
    )
    joined = Conditioning.cat([two[:1], two[1:]])
    assert torch.equal(joined.embeds, two.embeds) and torch.equal(joined.time_ids, two.time_ids)
    with pytest.raises(ValueError, match="one shape"):
        Conditioning.cat([two, tiny_sd1().prompts(PROMPTS)])
    with pytest.raises(ValueError, match="list"):
        model.prompts("a cat")


def test_tokens_are_the_pieces_of_a_text():
    assert tiny_sd1().tokens("a cat") == ["a", "cat"]
    assert "".join(tiny_sd1().tokens("a wug")) == "aw-u-g"


@pytest.mark.parametrize("source", ["nowhere/at/all", "/nowhere", "empty"])
def test_what_is_no_model_is_refused_in_one_line(source, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError) as caught:
        StableDiffusion.load(tmp_path / "empty" if source == "empty" else source)
    assert "\n" not in str(caught.value) and "give a" in str(caught.value)


def test_a_folder_without_weights_is_refused_in_one_line(tmp_path):
    folder = tiny_folder("sd1", tmp_path)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot load the base model") as caught:
        StableDiffusion.load(folder, device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("wrong", ["flux", "no json", "list"])
def test_folders_of_something_else_are_refused_in_one_line(wrong, tmp_path):
    index = {
        "flux": '{"_class_name": "FluxPipeline", "vae": ["diffusers", "AutoencoderKL"]}',
        "no json": "{",
        "list": "[1]",
    }
    (tmp_path / "model_index.json").write_text(index[wrong])
    with pytest.raises(UserError, match="no unet and no text_encoder" if wrong == "flux" else "cannot load") as caught:
        StableDiffusion.load(tmp_path, device="cpu")
    assert "\n" not in str(caught.value)


def test_a_pipeline_of_something_else_is_refused():
    pipe = tiny_pipeline("sd1")
    pipe.register_modules(text_encoder=None)
    with pytest.raises(UserError, match="no text_encoder"):
        StableDiffusion.from_pipeline(pipe)


def test_an_inpainting_unet_has_the_family_of_its_base():
    unet = tiny_sd1().unet
    unet.register_to_config(in_channels=9)
    assert family(unet, 1) == "sd1"


def test_a_refiner_is_refused():
    with pytest.raises(UserError, match="refiner"):
        family(tiny_sdxl().unet, 1)
