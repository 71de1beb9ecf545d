"""The released models' architectures without their weights, into which diffusers' own loader can load a LoRA.

Every weight is a zero expanded to the weight's shape, which takes no memory.  Weights on the meta device would not do:
diffusers would put the LoRA on that device too, and its values would be lost.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from personalize.models.blocks import leaf_modules
from personalize.models.config import TEXT_ENCODERS
from personalize.models.lora_modules import is_lora_layer
from personalize.models.quiet import quiet_loading

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

CONFIGS = Path(__file__).parent / "configs"
FOLDERS = {"sd1": "sd15", "sd2": "sd21", "sdxl": "sdxl"}
ENCODERS = {"text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection"}  # transformers' names


@dataclass(frozen=True)
class EmptyModel:
    """The UNet and text encoders of a released model, with zeros that take no memory in place of weights."""

    family: str
    unet: UNet2DConditionModel
    text_encoders: tuple[Any, ...]

    def pipeline(self) -> Any:
        """A stock pipeline of these parts, without VAE and tokenizers: it can load a LoRA, but not draw."""
        from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline

        parts: dict[str, Any] = {
            "vae": None,
            "unet": self.unet,
            "scheduler": DDIMScheduler(steps_offset=1, clip_sample=False),
        }
        parts |= dict(zip(TEXT_ENCODERS, self.text_encoders, strict=False))
        if self.family == "sdxl":
            return StableDiffusionXLPipeline(**parts, tokenizer=None, tokenizer_2=None, add_watermarker=False)  # pyright: ignore
        extra: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        return StableDiffusionPipeline(**parts, tokenizer=None, **extra)  # pyright: ignore


@quiet_loading()
def empty_model(family: str) -> EmptyModel:
    """A new empty model of `family`: "sd1", "sd2" or "sdxl"."""
    import transformers
    from diffusers import UNet2DConditionModel

    folder = CONFIGS / FOLDERS[family]
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet"))  # pyright: ignore
        encoders = [
            getattr(transformers, cls)(transformers.CLIPTextConfig.from_pretrained(folder / name))
            for name, cls in ENCODERS.items()
            if (folder / name).is_dir()
        ]
    for part in (unet, *encoders):
        _zero_weights(part)  # pyright: ignore[reportArgumentType]
    return EmptyModel(family, unet, tuple(encoders))  # pyright: ignore[reportArgumentType]


def _zero_weights(part: torch.nn.Module) -> None:
    """Replace every parameter and buffer of a module on the meta device by an expanded zero of its shape."""
    for module in part.modules():
        for name, tensor in module.named_parameters(recurse=False):
            zeros = torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
            setattr(module, name, torch.nn.Parameter(zeros, requires_grad=False))
        for name, tensor in module.named_buffers(recurse=False):
            setattr(module, name, torch.zeros((), dtype=tensor.dtype).expand(tensor.shape))


def parts_of(model: Any) -> dict[str, Any]:
    """The UNet and the text encoders of a base model, empty or not, by their names in diffusers' pipelines."""
    return {"unet": model.unet, **dict(zip(TEXT_ENCODERS, model.text_encoders, strict=False))}


def adaptable_layers(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every linear layer and convolution in `module` with its path; of a peft LoRA layer, the base layer."""
    for path, layer in leaf_modules(module):
        yield path, layer.get_base_layer() if is_lora_layer(layer) else layer


@cache
def empty_unet(family: str) -> UNet2DConditionModel:
    """A UNet on the meta device with the module names of `family` and few channels; cached, so not to be altered."""
    from diffusers import UNet2DConditionModel

    config: dict[str, Any] = {"norm_num_groups": 4, "cross_attention_dim": 8, "attention_head_dim": 4}
    if family == "sdxl":
        config |= {
            "block_out_channels": (4, 8, 16),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 8,
        }
    else:
        config["block_out_channels"] = (4, 8, 16, 16)  # where the width changes, a resnet has a conv_shortcut
    with torch.device("meta"):
        return UNet2DConditionModel(use_linear_projection=family != "sd1", **config)
