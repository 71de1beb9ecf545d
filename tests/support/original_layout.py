"""Original Stable Diffusion checkpoints for tests, made from diffusers models by renaming their weights."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

UNET = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0", "conv_out": "out.2", "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2", "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1", "mid_block.resnets.1": "middle_block.2",
}  # fmt: skip
RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip
OPEN_CLIP = {
    "embeddings.position_embedding.weight": "positional_embedding", "embeddings.token_embedding": "token_embedding",
    "final_layer_norm": "ln_final", "encoder.layers": "transformer.resblocks", "layer_norm1": "ln_1",
    "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj", "self_attn": "attn",
}  # fmt: skip


def original_layout(model: Any) -> dict[str, Tensor]:
    """All weights of a `StableDiffusion` model, named and laid out as in one original checkpoint."""
    state = {f"model.diffusion_model.{name}": tensor for name, tensor in unet_layout(model.unet).items()}
    state |= {f"first_stage_model.{name}": tensor for name, tensor in vae_layout(model.vae).items()}
    if model.family == "sd1":
        state |= clip_layout(model.text_encoders[0], "cond_stage_model.transformer.")
    elif model.family == "sd2":
        state |= open_clip_layout(model.text_encoders[0], "cond_stage_model.model.")
    else:
        state |= clip_layout(model.text_encoders[0], "conditioner.embedders.0.transformer.")
        state |= open_clip_layout(model.text_encoders[1], "conditioner.embedders.1.model.")
    return {name: tensor.clone().contiguous() for name, tensor in state.items()}


def unet_layout(unet: torch.nn.Module) -> dict[str, Tensor]:
    """The UNet's weights by their original names, in which all blocks of a side are numbered in one sequence."""
    state = unet.state_dict()
    attends = {name.split(".attentions")[0] for name in state if ".attentions." in name}
    return {_unet_name(name, attends): tensor for name, tensor in state.items()}


def _unet_name(name: str, attends: set[str]) -> str:
    if ".resnets." in name:
        name = _replaced(name, RESNET)
    name = _replaced(name, UNET)
    if not (match := re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", name)):
        return name
    side, block, kind, layer, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    first = 3 * block + (1 if side == "down" else 0)
    group = "input_blocks" if side == "down" else "output_blocks"
    if kind == "downsamplers":
        return f"{group}.{first + 2}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        return f"{group}.{first + 2}.{2 if f'up_blocks.{block}' in attends else 1}.{rest}"
    return f"{group}.{first + layer}.{0 if kind == 'resnets' else 1}.{rest}"


def vae_layout(vae: torch.nn.Module) -> dict[str, Tensor]:
    """The autoencoder's weights by their original names, in which the decoder's blocks are numbered from the last."""
    last = len(vae.config.block_out_channels) - 1

    def renamed(name: str) -> str:
        name = re.sub(r"decoder\.up_blocks\.(\d+)", lambda match: f"decoder.up.{last - int(match[1])}", name)
        name = re.sub(r"encoder\.down_blocks\.(\d+)", r"encoder.down.\1", name)
        name = re.sub(r"mid_block\.resnets\.(\d+)", lambda match: f"mid.block_{int(match[1]) + 1}", name)
        names = {".resnets.": ".block.", ".downsamplers.0": ".downsample", ".upsamplers.0": ".upsample"}
        return _replaced(name, names | {"conv_norm_out": "norm_out", "conv_shortcut": "nin_shortcut"})

    return {renamed(name): tensor for name, tensor in vae.state_dict().items()}


def clip_layout(encoder: torch.nn.Module, prefix: str) -> dict[str, Tensor]:
    """A CLIP text encoder's weights as SD 1.x and SDXL have them."""
    return {f"{prefix}text_model.{name}": tensor for name, tensor in _bare(encoder).items()}


def open_clip_layout(encoder: torch.nn.Module, prefix: str) -> dict[str, Tensor]:
    """An OpenCLIP text encoder's weights as SD 2.x and SDXL have them: one matrix for queries, keys and values."""
    state: dict[str, Tensor] = {}
    for name, tensor in _bare(encoder).items():
        if name == "text_projection.weight":
            state["text_projection"] = tensor.T
        elif match := re.match(r"(.*self_attn)\.q_proj\.(\w+)", name):
            parts = [_bare(encoder)[f"{match[1]}.{letter}_proj.{match[2]}"] for letter in "qkv"]
            state[_replaced(f"{match[1]}.in_proj_{match[2]}", OPEN_CLIP)] = torch.cat(parts)
        elif not re.search(r"self_attn\.[kv]_proj", name):
            state[_replaced(name, OPEN_CLIP)] = tensor
    return {prefix + name: tensor for name, tensor in state.items()}


def _bare(encoder: torch.nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix("text_model."): tensor for name, tensor in encoder.state_dict().items()}


def _replaced(name: str, names: dict[str, str]) -> str:
    for old, new in names.items():
        name = name.replace(old, new)
    return name
