"""Tiny base models with random weights and the topology of each family, built offline and cached for the session."""

from __future__ import annotations

from collections import OrderedDict
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch.nn import Module, Parameter
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from personalize.models.stable_diffusion import StableDiffusion
from personalize.training.pretraining.networks import build_tokenizer

NAMES = ("sd1", "sd2v", "sdxl")
WORDS = "a an and cat dog fox in my of on park photo picture red blue sitting the wearing beach snow mountain".split()
GROUPS = 8


def tiny_sd1() -> StableDiffusion:
    """A tiny SD 1.x: 216 single-image LoRA modules, ε prediction, 64 px, latents 16×16×4, text width 32."""
    return tiny("sd1")


def tiny_sd2v() -> StableDiffusion:
    """A tiny SD 2.x: linear projections, more heads in wider blocks, v prediction, text width 48."""
    return tiny("sd2v")


def tiny_sdxl() -> StableDiffusion:
    """A tiny SDXL: stages of 0, 2 and 3 transformer blocks, two text encoders, pooled embedding, time ids."""
    return tiny("sdxl")


def tiny(name: str) -> StableDiffusion:
    """A new copy of the tiny model `name` in NAMES, which a test may alter."""
    return StableDiffusion.from_pipeline(tiny_pipeline(name), name=f"tiny-{name}")


def tiny_pipeline(name: str) -> Any:
    """A new copy of the diffusers pipeline `name` in NAMES, frozen, fp32, on the CPU."""
    pipe = _built(name)
    copies = {key: _fast_copy(part) if key == "unet" else deepcopy(part) for key, part in pipe.components.items()}
    extra = {"requires_safety_checker": False} if name != "sdxl" else {"add_watermarker": False}
    return type(pipe)(**copies, **extra)


def tiny_inpainting_pipeline(name: str) -> Any:
    """The pipeline `name` as diffusers saves an inpainting model: its UNet reads a mask and a masked picture too."""
    pipe = tiny_pipeline(name)
    more = torch.randn(len(pipe.unet.conv_in.weight), 5, 3, 3, generator=torch.Generator().manual_seed(1))
    pipe.unet.conv_in = _widened(pipe.unet.conv_in, 0.1 * more)
    pipe.unet.register_to_config(in_channels=9)
    cls = StableDiffusionXLInpaintPipeline if name == "sdxl" else StableDiffusionInpaintPipeline
    extra = {"requires_safety_checker": False} if name != "sdxl" else {"add_watermarker": False}
    return cls(**pipe.components, **extra)


def _widened(convolution: Any, more: torch.Tensor) -> torch.nn.Conv2d:
    """`convolution` with the further input channels `more` (out, in, 3, 3)."""
    wide = torch.nn.Conv2d(convolution.in_channels + more.shape[1], convolution.out_channels, 3, padding=1)
    wide.load_state_dict({"weight": torch.cat([convolution.weight, more], 1), "bias": convolution.bias})
    return wide.requires_grad_(False)


def _fast_copy(module: Module) -> Module:
    """deepcopy(module) in a fraction of the time, for modules that have only settings, weights and submodules."""
    copy = module.__new__(type(module))
    attributes = vars(copy)
    for key, value in vars(module).items():
        attributes[key] = value.copy() if type(value) in (dict, OrderedDict, set) else value
    for key, weight in module._parameters.items():
        if weight is not None:
            attributes["_parameters"][key] = Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    for key, child in module._modules.items():
        attributes["_modules"][key] = None if child is None else _fast_copy(child)
    return copy


def tiny_folder(name: str, path: str | Path) -> Path:
    """Write the tiny model `name` in NAMES as a diffusers folder below `path`; returns the folder."""
    folder = Path(path) / f"tiny-{name}"
    tiny_pipeline(name).save_pretrained(folder)
    return folder


@cache
def _built(name: str) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(NAMES.index(name))
        pipe = {"sd1": _sd1, "sd2v": _sd2v, "sdxl": _sdxl}[name]()
        _scale_up(pipe.unet)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _scale_up(unet: UNet2DConditionModel) -> None:
    """Scale a random UNet's weights so that its output is of about unit size, and the text has a visible effect."""
    with torch.no_grad():
        unet.conv_out.weight.mul_(4)
        for key, parameter in unet.named_parameters():
            if key.endswith(("attn2.to_q.weight", "attn2.to_k.weight", "attn2.to_v.weight", "attn2.to_out.0.weight")):
                parameter.mul_(2)


def _sd1() -> StableDiffusionPipeline:
    unet = UNet2DConditionModel(
        sample_size=16, layers_per_block=2, block_out_channels=(16, 32, 64, 64), norm_num_groups=GROUPS,
        cross_attention_dim=32, attention_head_dim=2,
    )  # fmt: skip
    tokenizer = build_tokenizer(WORDS)
    return StableDiffusionPipeline(
        vae=_vae(), unet=unet, scheduler=_scheduler("epsilon"), text_encoder=CLIPTextModel(_text(tokenizer, 32)),
        tokenizer=tokenizer, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def _sd2v() -> StableDiffusionPipeline:
    unet = UNet2DConditionModel(
        sample_size=16, layers_per_block=2, block_out_channels=(16, 32, 64, 64), norm_num_groups=GROUPS,
        cross_attention_dim=48, attention_head_dim=(2, 4, 8, 8), use_linear_projection=True,
    )  # fmt: skip
    tokenizer = build_tokenizer(WORDS)
    text = CLIPTextModel(_text(tokenizer, 48, hidden_act="gelu"))
    return StableDiffusionPipeline(
        vae=_vae(), unet=unet, scheduler=_scheduler("v_prediction"), text_encoder=text,
        tokenizer=tokenizer, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def _sdxl() -> StableDiffusionXLPipeline:
    unet = UNet2DConditionModel(
        sample_size=16, layers_per_block=2, block_out_channels=(16, 32, 64), norm_num_groups=GROUPS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 3), attention_head_dim=(2, 4, 8), use_linear_projection=True,
        cross_attention_dim=32 + 40, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=40 + 6 * 8,
    )  # fmt: skip
    first, second = build_tokenizer(WORDS), build_tokenizer(WORDS)
    return StableDiffusionXLPipeline(
        vae=_vae(), unet=unet, scheduler=_scheduler("epsilon"), tokenizer=first, tokenizer_2=second,
        text_encoder=CLIPTextModel(_text(first, 32)),
        text_encoder_2=CLIPTextModelWithProjection(_text(second, 40, hidden_act="gelu", projection_dim=40)),
        add_watermarker=False,
    )  # fmt: skip


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 16, 16), layers_per_block=1, latent_channels=4, norm_num_groups=GROUPS,
        sample_size=64, mid_block_add_attention=False, scaling_factor=0.5,
    )  # fmt: skip


def _text(tokenizer: Any, width: int, **extra: Any) -> CLIPTextConfig:
    settings = {"hidden_act": "quick_gelu", "projection_dim": width} | extra
    return CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=77, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, dtype="float32", **settings,
    )  # fmt: skip


def _scheduler(prediction_type: str) -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, prediction_type=prediction_type,
    )  # fmt: skip
