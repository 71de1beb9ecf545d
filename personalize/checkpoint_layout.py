"""The original layout of Stable Diffusion checkpoints: one file, in the names of the code the models came from.

    model.diffusion_model.…                the UNet
    first_stage_model.…                    the autoencoder
    cond_stage_model.transformer.…         SD 1.x: CLIP in transformers' names
    cond_stage_model.model.…               SD 2.x: OpenCLIP's names
    conditioner.embedders.0.transformer.…  SDXL's first encoder, CLIP
    conditioner.embedders.1.model.…        SDXL's second encoder, OpenCLIP

Besides names three things differ: OpenCLIP keeps q, k and v in one matrix and the text projection transposed, and the
autoencoder's attention consists of 1×1 convolutions instead of linear layers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from personalize.errors import UserError
from personalize.lora_names import ORIGINAL_NAMES, ORIGINAL_RESNET

Weights = Mapping[str, Tensor]
UNET, VAE = "model.diffusion_model.", "first_stage_model."
TEXT = {  # by family: prefix and kind of each text encoder
    "sd1": {"text_encoder": ("cond_stage_model.transformer.", "clip")},
    "sd2": {"text_encoder": ("cond_stage_model.model.", "open_clip")},
    "sdxl": {
        "text_encoder": ("conditioner.embedders.0.transformer.", "clip"),
        "text_encoder_2": ("conditioner.embedders.1.model.", "open_clip"),
    },
}
OUTER = ORIGINAL_NAMES | {"conv_norm_out": "out.0"}
RESNET = ORIGINAL_RESNET | {"norm1": "in_layers.0", "norm2": "out_layers.0"}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP = {
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.token_embedding": "token_embedding", "final_layer_norm": "ln_final",
    "encoder.layers": "transformer.resblocks", "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj", "self_attn.out_proj": "attn.out_proj",
}  # fmt: skip


def original_state(parts: Mapping[str, Weights], family: str) -> dict[str, Tensor]:
    """All weights under their original names; `parts` are "unet", "vae", "text_encoder" and "text_encoder_2".

    Text encoders are in transformers' names with `text_model.`.

    Raises:
        UserError: a weight whose original name is not known.
    """
    state = {UNET + name: tensor for name, tensor in unet_state(parts["unet"]).items()}
    state |= {VAE + name: tensor for name, tensor in vae_state(parts["vae"]).items()}
    for component, (prefix, kind) in TEXT[family].items():
        weights = parts[component]
        text = open_clip_state(weights) if kind == "open_clip" else dict(weights)
        state |= {prefix + name: tensor for name, tensor in text.items()}
    return state


def unet_state(weights: Weights) -> dict[str, Tensor]:
    """The UNet's weights by original name (two resnets per down block, three per up block)."""
    attending = {match[0] for name in weights if (match := re.match(r"up_blocks\.\d+(?=\.attentions)", name))}
    return {unet_name(name, attending): tensor for name, tensor in weights.items()}


def unet_name(name: str, attending: set[str]) -> str:
    """The original name of one weight; `attending` are the up blocks with attention, whose upsampler stands third."""
    path, _, kind = name.rpartition(".")
    if path in OUTER:
        return f"{OUTER[path]}.{kind}"
    if match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.+)", path):
        number = 1 if match[1] == "attentions" else 2 * int(match[2])
        return f"middle_block.{number}.{RESNET.get(match[3], match[3])}.{kind}"
    match = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", path)
    if match is None:
        raise UserError(
            f"the UNet's weight {name[:120]} has no name in an original checkpoint: export a folder instead"
        )
    side, group, layer, inner = match[1], match[3], int(match[4]), match[5]
    row, first = 3 * int(match[2]), "input_blocks" if side == "down" else "output_blocks"
    if group == "downsamplers":
        return f"{first}.{row + 3}.0.op.{kind}"
    if group == "upsamplers":
        return f"{first}.{row + 2}.{2 if f'up_blocks.{match[2]}' in attending else 1}.conv.{kind}"
    return f"{first}.{row + layer + (side == 'down')}.{int(group == 'attentions')}.{RESNET.get(inner, inner)}.{kind}"


def vae_state(weights: Weights) -> dict[str, Tensor]:
    """The autoencoder's weights by original name; the decoder's stages are numbered from the last."""
    stages = 1 + max(int(match[1]) for name in weights if (match := re.match(r"decoder\.up_blocks\.(\d+)", name)))
    return {vae_name(name, stages): _convolution(name, tensor) for name, tensor in weights.items()}


def vae_name(name: str, stages: int) -> str:
    path, _, kind = name.rpartition(".")
    if match := re.fullmatch(r"(encoder|decoder)\.mid_block\.attentions\.0\.(.+)", path):
        return f"{match[1]}.mid.attn_1.{VAE_ATTENTION[match[2]]}.{kind}"
    path = re.sub(r"mid_block\.resnets\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}", path)
    path = re.sub(r"down_blocks\.(\d+)", r"down.\1", path)
    path = re.sub(r"up_blocks\.(\d+)", lambda match: f"up.{stages - 1 - int(match[1])}", path)
    path = path.replace(".resnets.", ".block.").replace("downsamplers.0.", "downsample.")
    path = path.replace("upsamplers.0.", "upsample.").replace("conv_norm_out", "norm_out")
    return f"{path.replace('conv_shortcut', 'nin_shortcut')}.{kind}"


def _convolution(name: str, tensor: Tensor) -> Tensor:
    """A linear layer (out, in) of the middle attention as the 1×1 convolution (out, in, 1, 1) it is in the original."""
    return tensor[..., None, None] if "mid_block.attentions" in name and tensor.ndim == 2 else tensor


def open_clip_state(weights: Weights) -> dict[str, Tensor]:
    """A text encoder's weights as OpenCLIP names them: q, k and v in one, the projection transposed."""
    state = {}
    for name, tensor in weights.items():
        bare = name.removeprefix("text_model.")
        if bare == "text_projection.weight":
            state["text_projection"] = tensor.T
        elif match := re.fullmatch(r"(.*self_attn)\.([qkv])_proj\.(weight|bias)", name):
            if match[2] == "q":
                parts = [weights[f"{match[1]}.{letter}_proj.{match[3]}"] for letter in "qkv"]
                stem = _open_clip_name(bare.partition(".self_attn.")[0])
                state[f"{stem}.attn.in_proj_{match[3]}"] = torch.cat(parts)
        else:
            state[_open_clip_name(bare)] = tensor
    return state


def _open_clip_name(name: str) -> str:
    for ours, theirs in OPEN_CLIP.items():
        name = name.replace(ours, theirs)
    return name
