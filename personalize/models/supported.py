"""Whether a base model is of the kind that this package knows; its latents' size, and what its UNet predicts."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import cosine_similarity, interpolate

from personalize.errors import UserError
from personalize.models import parameterization
from personalize.randomness import generator

PROBED_ALPHA = 0.05  # ᾱ where ε and v differ clearly: cos(ε, v) = √ᾱ if the clean latents are independent of ε
PROMPT_ALONE = {  # settings of a UNet that reads a prompt alone, as CLIP's text encoders encode it
    "addition_embed_type": (None, "text_time"), "class_embed_type": (None,), "num_class_embeds": (None,),
    "encoder_hid_dim_type": (None,),
}  # fmt: skip
LEAST_COSINE = 0.7  # of a UNet that predicts ε; one that predicts v comes to about √ᾱ, 0.2


def require_supported(scheduler: Any, vae: Any, name: str) -> None:
    """UserError, with the reason, for a base whose noise schedule or latents are of another kind.

    Supported are z_t = √ᾱ x0 + √(1−ᾱ) ε over the betas of the schedule, and latents that are the autoencoder's times a
    scaling factor.
    """
    config, kind = scheduler.config, type(scheduler).__name__
    if "sigma_data" in config or kind.startswith("EDM"):
        raise UserError(f"{name} has an EDM schedule ({kind}): give a base with the schedule of Stable Diffusion")
    if kind.startswith("FlowMatch") or config.get("use_flow_sigmas") or "flow" in str(config.get("prediction_type")):
        raise UserError(f"{name} is a flow-matching model ({kind}): give a base with the schedule of Stable Diffusion")
    if "beta_schedule" not in config or config.get("prediction_type") is None:
        raise UserError(f"{name} has the scheduler {kind}, which states no betas or no prediction type: give another")
    stated = [key for key in ("latents_mean", "latents_std", "shift_factor") if vae.config.get(key)]  # 0: none
    if stated:
        raise UserError(
            f"the autoencoder of {name} shifts or scales each channel ({stated[0]}), which is not supported: give a "
            "base with Stable Diffusion's autoencoder"
        )
    if vae.config.get("scaling_factor") is None or not hasattr(vae, "encode"):
        raise UserError(
            f"the autoencoder of {name} ({type(vae).__name__}) has no scaling_factor: give an AutoencoderKL"
        )


def require_usable(unet: Any, vae: Any, name: object) -> None:
    """UserError for parts that serve a pipeline which only borrows an adapter, but not to train, edit or drag.

    These are a UNet that is told the guidance scale itself, by an embedding, instead of being asked twice; one that
    reads more than a prompt, such as a picture's embedding or a class; and an autoencoder that gives no distribution of
    latents (TAESD).
    """
    if unet.config.get("time_cond_proj_dim") is not None:
        raise UserError(
            f"{name} takes the guidance scale as an embedding (time_cond_proj_dim), which is not supported: give the "
            "base it was distilled from, with an LCM LoRA (--add) for few steps"
        )
    reads = [key for key, usual in PROMPT_ALONE.items() if unet.config.get(key) not in usual]
    if reads:
        raise UserError(
            f"the UNet of {name} reads more than a prompt ({reads[0]}: {unet.config[reads[0]]}), which is not "
            "supported: give a base without that"
        )
    if not hasattr(vae.decoder, "conv_in"):
        raise UserError(
            f"the autoencoder of {name} ({type(vae).__name__}) gives no distribution of latents: give a base with an "
            "AutoencoderKL"
        )


def latent_size(unet: Any) -> tuple[int, int]:
    """The latents' sides (h, w) that a UNet says it was trained on; where it says none, those of its family.

    `sample_size` is one number or two, as diffusers' pipelines take it, or None.
    """
    stated = unet.config.get("sample_size")
    if stated is None:
        stated = 128 if unet.config.get("addition_embed_type") == "text_time" else 64
    height, width = (stated, stated) if isinstance(stated, int) else stated
    return height, width


@torch.no_grad()
def predicted_quantity(unet: Any, alphas_cumprod: torch.Tensor, width: int) -> str:
    """ "epsilon" or "v_prediction", by one forward pass at a known noise level.

    Noisy latents z_t are made of smooth random ones and noise ε.  A UNet that predicts ε returns nearly ε; one that
    predicts v = √ᾱ ε − √(1−ᾱ) x0 returns hardly any of it.

    Args:
        alphas_cumprod: ᾱ of every training timestep.
        width: of the text embeddings; zeros are given for them.
    """
    rng, weight = generator(0, "prediction type"), unet.conv_in.weight
    channels, beside = unet.config.out_channels, unet.config.in_channels - unet.config.out_channels
    timestep = int((alphas_cumprod - PROBED_ALPHA).abs().argmin())
    smooth = interpolate(torch.randn(1, channels, 4, 4, generator=rng), size=(32, 32), mode="bilinear")
    noise = torch.randn(smooth.shape, generator=rng)
    z = parameterization.noised(smooth / smooth.std(), noise, alphas_cumprod[timestep].cpu())
    z = torch.cat([z, z.new_ones(1, min(1, beside), 32, 32), z.new_zeros(1, max(0, beside - 1), 32, 32)], 1)
    text = torch.zeros(1, 77, width, device=weight.device, dtype=weight.dtype)
    output = unet(z.to(weight), torch.tensor(timestep, device=weight.device), text, return_dict=False)[0].float().cpu()
    cosine = cosine_similarity(output.flatten(), noise.flatten(), 0)
    return "epsilon" if float(cosine) > LEAST_COSINE else "v_prediction"
