"""Base models for the speed bench; with random weights, for the time depends on shapes and not on values."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from personalize.models.stable_diffusion import StableDiffusion
from personalize.training.pretraining.networks import build_tokenizer

SD15: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
SDXL: dict[str, Any] = {
    "sample_size": 128, "cross_attention_dim": 2048, "attention_head_dim": [5, 10, 20], "use_linear_projection": True,
    "block_out_channels": (320, 640, 1280), "transformer_layers_per_block": [1, 2, 10],
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
WORDS = ["a", "photo", "of", "cat", "dog"]


@cache
def base(name: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> StableDiffusion:
    """The base `name`: "embedded", "sd15" or "sdxl" (random weights in their shapes), or a folder."""
    if name not in ("sd15", "sdxl"):
        return StableDiffusion.load(None if name == "embedded" else name, dtype=dtype, device=device)
    with torch.device(device):
        pipe = (_sd15 if name == "sd15" else _sdxl)(dtype)
    for part in (part for part in pipe.components.values() if isinstance(part, torch.nn.Module)):
        part.requires_grad_(False).eval().to(device)
    return StableDiffusion.from_pipeline(pipe, f"random-{name}")


def _sd15(dtype: torch.dtype) -> Any:
    tokenizer = build_tokenizer(WORDS)
    return StableDiffusionPipeline(
        vae=_vae(512), unet=UNet2DConditionModel(**SD15).to(dtype), scheduler=scheduler(),  # pyright: ignore
        text_encoder=CLIPTextModel(text_config(tokenizer, 768, 12)), tokenizer=tokenizer, safety_checker=None,  # pyright: ignore
        feature_extractor=None, requires_safety_checker=False,  # pyright: ignore
    )  # fmt: skip


def _sdxl(dtype: torch.dtype) -> Any:
    first, second = build_tokenizer(WORDS), build_tokenizer(WORDS)
    return StableDiffusionXLPipeline(
        vae=_vae(1024), unet=UNet2DConditionModel(**SDXL).to(dtype), scheduler=scheduler(),  # pyright: ignore
        text_encoder=CLIPTextModel(text_config(first, 768, 12)), tokenizer=first, tokenizer_2=second,  # pyright: ignore
        text_encoder_2=CLIPTextModelWithProjection(text_config(second, 1280, 32)), add_watermarker=False,  # pyright: ignore
    )  # fmt: skip


def _vae(side: int) -> AutoencoderKL:
    blocks: dict[str, Any] = {
        "block_out_channels": (128, 256, 512, 512), "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    }  # fmt: skip
    return AutoencoderKL(**blocks, layers_per_block=2, latent_channels=4, sample_size=side)


def text_config(tokenizer: Any, width: int, layers: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=width // 64, max_position_embeddings=77, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, projection_dim=width,
    )  # fmt: skip


def scheduler() -> DDIMScheduler:
    noise: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    return DDIMScheduler(**noise, steps_offset=1, clip_sample=False)
