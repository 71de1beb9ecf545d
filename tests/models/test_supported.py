"""Bases of other kinds are refused with the reason, and what a UNet predicts is found out where no file says it."""

from types import SimpleNamespace
from typing import Any

import pytest
from diffusers import DDIMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from torch import nn

from personalize.errors import UserError
from personalize.models.attention import attention_sites
from personalize.models.stable_diffusion import StableDiffusion
from personalize.models.supported import latent_size, predicted_quantity, require_supported
from tests.support.tiny import tiny_pipeline


@pytest.mark.parametrize(
    ("scheduler", "vae", "reason"),
    [
        (EDMEulerScheduler(), {}, "EDM schedule .EDMEulerScheduler."),
        (FlowMatchEulerDiscreteScheduler(), {}, "flow-matching model"),
        (None, {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}, "latents_mean"),
        (None, {"shift_factor": 0.1}, "shift_factor"),
        (None, {"scaling_factor": None}, "has no scaling_factor"),
    ],
)
def test_another_kind_of_base_is_refused_with_the_reason(scheduler: Any, vae: dict[str, Any], reason: str) -> None:
    pipe = tiny_pipeline("sd1")
    pipe.scheduler = scheduler or pipe.scheduler
    pipe.vae.register_to_config(**vae)
    with pytest.raises(UserError, match=reason):
        StableDiffusion.from_pipeline(pipe, name="some base")


def test_stable_diffusions_own_kinds_are_taken() -> None:
    for name, kind in (("sd1", "epsilon"), ("sd2v", "v_prediction"), ("sdxl", "epsilon")):
        assert StableDiffusion.from_pipeline(tiny_pipeline(name), name=name).prediction_type == kind
    pipe = tiny_pipeline("sd2v")
    pipe.scheduler = DDIMScheduler(rescale_betas_zero_snr=True)
    assert float(StableDiffusion.from_pipeline(pipe, name="zero SNR").alphas_cumprod[-1]) == pytest.approx(0, abs=1e-6)


class AsVelocity(nn.Module):
    """A UNet that predicts ε, turned into the same model predicting v."""

    def __init__(self, model: StableDiffusion) -> None:
        super().__init__()
        self.unet, self.model, self.config, self.conv_in = model.unet, (model,), model.unet.config, model.unet.conv_in

    def forward(self, z: Any, timestep: Any, text: Any, **rest: Any) -> Any:
        eps = self.unet(z, timestep, text, **rest)[0]
        alpha = self.model[0].alphas_cumprod[timestep]
        return ((eps - (1 - alpha).sqrt() * z) / alpha.sqrt(),)  # v = (ε − √(1−ᾱ) z) / √ᾱ, from the two definitions


def test_one_forward_pass_tells_epsilon_from_velocity() -> None:
    model = StableDiffusion.load()  # trained: random weights predict neither
    width = model.unet.config.cross_attention_dim
    assert predicted_quantity(model.unet, model.alphas_cumprod, width) == "epsilon"
    assert predicted_quantity(AsVelocity(model), model.alphas_cumprod, width) == "v_prediction"


def test_a_base_says_what_it_cannot_be() -> None:
    other = SimpleNamespace(config={"prediction_type": "epsilon"})
    with pytest.raises(UserError, match="states no betas"):
        require_supported(other, None, "some base")


@pytest.mark.parametrize(
    ("stated", "sd1", "sdxl"),
    [(None, (64, 64), (128, 128)), (40, (40, 40), (40, 40)), ([48, 32], (48, 32), (48, 32))],
)
def test_a_unet_may_state_the_size_of_its_latents_as_one_number_two_or_none(stated: Any, sd1: Any, sdxl: Any) -> None:
    """diffusers' pipelines take all three; two or none ended in a TypeError."""
    for name, size in (("sd1", sd1), ("sdxl", sdxl)):
        pipe = tiny_pipeline(name)
        pipe.unet.register_to_config(sample_size=stated)
        assert latent_size(pipe.unet) == size
        model = StableDiffusion.from_pipeline(pipe)
        assert model.resolution == size[0] * model.factor
        sites = attention_sites(pipe.unet)
        assert max(site.height for site in sites.values()) <= size[0]
