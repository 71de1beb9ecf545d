"""`attach` to pipelines in every state that people have them in: it works, or names the call that helps."""

import accelerate
import pytest
import torch
from diffusers import StableDiffusionInpaintPipeline, UNet2DConditionModel
from safetensors.torch import save_file

import personalize
from personalize.errors import UserError
from personalize.models.loading import load_pipeline
from tests.support.adapter_kinds import KINDS, text_lora
from tests.support.foreign_files import kohya, save
from tests.support.tiny import tiny_pipeline


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    return KINDS["LoRA, kohya's names"]().write(tmp_path_factory.mktemp("lora") / "x")


def prediction(pipe, channels=4):
    """The pipeline's own UNet on fixed inputs."""
    draw = torch.Generator().manual_seed(0)
    latents, text = torch.randn(1, 4, 16, 16, generator=draw), torch.randn(1, 5, 32, generator=draw)
    latents = torch.cat([latents, latents.new_zeros(1, channels - 4, 16, 16)], 1)
    with torch.no_grad():
        return pipe.unet(latents, 500, text, return_dict=False)[0].float()


@pytest.fixture(scope="module")
def wanted(lora):
    """The prediction of a plain pipeline with the LoRA, by diffusers' own loader."""
    pipe = tiny_pipeline("sd1")
    pipe.load_lora_weights(str(lora))
    return prediction(pipe)


def compiled(pipe):
    pipe.unet = torch.compile(pipe.unet, backend="eager")


def offloaded(pipe):
    accelerate.cpu_offload(pipe.unet, torch.device("cpu"))


def group_offloaded(pipe):
    pipe.unet.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")


@pytest.mark.parametrize("state", [pytest.param(compiled, marks=pytest.mark.slow), offloaded, group_offloaded])
def test_it_works_on_compiled_and_offloaded_unets_and_leaves_nothing(lora, wanted, state):
    pipe = tiny_pipeline("sd1")
    plain = prediction(pipe)
    state(pipe)
    assert (prediction(pipe) - plain).abs().max() < 1e-5
    with personalize.attach(pipe, lora):
        inside = prediction(pipe)
    assert (inside - wanted).abs().max() < 1e-4 * wanted.abs().max(), "single precision, in another order"
    assert (prediction(pipe) - plain).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["text encoder alone", "LoHa", "LoRA and biases"])
def test_what_has_moved_meanwhile_is_put_back(tmp_path, kind):
    """Offloading gives parameters new storage; what was written back into the old one left the adapter in for good."""
    pipe, file = tiny_pipeline("sd1"), tmp_path / "a.safetensors"
    save_file(KINDS[kind]().tensors, file)
    parts = (pipe.unet, pipe.text_encoder)
    before = [{name: tensor.clone() for name, tensor in part.state_dict().items()} for part in parts]
    with personalize.attach(pipe, file):
        assert any(not torch.equal(old[name], tensor) for part, old in zip(parts, before, strict=True)
                   for name, tensor in part.state_dict().items() if name in old)  # fmt: skip
        for part in parts:
            part._apply(lambda tensor: tensor.clone())  # as part.to(device) does
    for part, old in zip(parts, before, strict=True):
        assert all(torch.equal(old[name], tensor) for name, tensor in part.state_dict().items())


def test_it_works_on_a_unet_that_stores_eight_bits(lora):
    pipe, reference = tiny_pipeline("sd1"), tiny_pipeline("sd1")
    for one in (pipe, reference):
        one.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    plain = prediction(pipe)
    with personalize.attach(pipe, lora) as attached:
        assert attached.inputs("a cat")["prompt_embeds"].dtype == torch.float32
        assert (prediction(pipe) - plain).abs().max() > 1e-3
    assert torch.equal(prediction(pipe), plain)


def test_it_works_on_an_inpainting_unet_also_with_its_first_convolution(tmp_path, lora):
    base = tiny_pipeline("sd1")
    config = {key: value for key, value in base.unet.config.items() if not key.startswith("_")} | {"in_channels": 9}
    unet = UNet2DConditionModel(**config).requires_grad_(False).eval()
    state = {key: tensor for key, tensor in base.unet.state_dict().items() if not key.startswith("conv_in.weight")}
    unet.load_state_dict(state, strict=False)
    unet.conv_in.weight[:, :4] = base.unet.conv_in.weight
    parts = {
        "vae": base.vae,
        "text_encoder": base.text_encoder,
        "tokenizer": base.tokenizer,
        "scheduler": base.scheduler,
    }
    pipe = StableDiffusionInpaintPipeline(
        unet=unet, safety_checker=None, feature_extractor=None, requires_safety_checker=False, **parts
    )
    draw = torch.Generator().manual_seed(0)
    first = {"unet.conv_in.lora_A.weight": torch.randn(2, 4, 3, 3, generator=draw),
             "unet.conv_in.lora_B.weight": torch.randn(16, 2, 1, 1, generator=draw)}  # fmt: skip
    file = save(tmp_path / "first.safetensors", kohya(first, "sd1", alphas=2.0), {"ss_base_model_version": "sd_v1"})
    for one in (lora, file):  # with zeros as mask and masked picture, the nine channels say what the four do
        with personalize.attach(tiny_pipeline("sd1"), one):
            pass
        four = tiny_pipeline("sd1")
        with personalize.attach(four, one), personalize.attach(pipe, one):
            assert (prediction(pipe, 9) - prediction(four)).abs().max() < 1e-4


def fused(pipe, lora):
    pipe.load_lora_weights(str(lora))
    pipe.fuse_lora()


def deleted(pipe, lora):
    pipe.load_lora_weights(str(lora), adapter_name="a")
    pipe.delete_adapters("a")


def loaded(pipe, lora):
    pipe.load_lora_weights(str(lora))


def joined(pipe, lora):
    pipe.fuse_qkv_projections(vae=False)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (fused, r"fused into its weights: call pipe.unload_lora_weights\(\)"),
        (deleted, r"empty LoRA layers: call pipe.unload_lora_weights\(\)"),
        (loaded, r"already carries an adapter: call pipe.unload_lora_weights\(\)"),
        (joined, r"call pipe.unfuse_qkv_projections\(\)"),
    ],
)
def test_states_in_which_it_cannot_work_name_the_call_that_helps(lora, state, message):
    pipe = tiny_pipeline("sd1")
    state(pipe, lora)
    with pytest.raises(UserError, match=message), personalize.attach(pipe, lora):
        pass


def test_a_second_adapter_is_attached_together_with_the_first(lora):
    """It was said to unload the LoRA, which takes the first one's layers out of its own block."""
    pipe = tiny_pipeline("sd1")
    with personalize.attach(pipe, lora):
        with pytest.raises(UserError, match=r"apply both together, as in attach\(pipe, \[first, second\]\)") as refused:
            with personalize.attach(pipe, lora):
                pass
        assert "unload" not in str(refused.value)
    with personalize.attach(pipe, [lora, lora]):
        pass


def test_a_lora_on_the_text_encoder_is_no_other_base(tmp_path):
    pipe = tiny_pipeline("sd1")
    file = save(tmp_path / "text.safetensors", kohya(text_lora(), "sd1", 2.0), {"ss_base_model_version": "sd_v1"})
    pipe.load_lora_weights(str(file))
    with pytest.raises(UserError, match="text_encoder already carries an adapter"), personalize.attach(pipe, file):
        pass


def test_a_base_saved_with_lora_layers_in_it_is_refused(tmp_path, lora):
    pipe = tiny_pipeline("sd1")
    fused(pipe, lora)
    pipe.save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match=r"saved with LoRA layers in it .* pipe.unload_lora_weights\(\)"):
        load_pipeline(tmp_path / "base", torch.float32)
