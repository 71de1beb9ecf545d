"""Translate a model's weights into the original layout of Stable Diffusion checkpoints: one file, original names.

The prefixes say which network a weight belongs to:

    model.diffusion_model.…                the UNet
    first_stage_model.…                    the autoencoder
    cond_stage_model.transformer.…         SD 1.x: CLIP in transformers' names
    cond_stage_model.model.…               SD 2.x: OpenCLIP's names
    conditioner.embedders.0.transformer.…  SDXL's first encoder, CLIP
    conditioner.embedders.1.model.…        SDXL's second encoder, OpenCLIP

Three things differ besides names: OpenCLIP keeps q, k and v in one matrix, it keeps the text projection transposed, and
the autoencoder's attention has 1×1 convolutions instead of linear layers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from personalize.errors import UserError
from personalize.formats.lora_keys import original_name

Weights = Mapping[str, Tensor]
UNET_PREFIX, VAE_PREFIX = "model.diffusion_model.", "first_stage_model."
TEXT_ENCODER_PREFIXES = {  # for each family: prefix and naming scheme of each text encoder
    "sd1": {"text_encoder": ("cond_stage_model.transformer.", "clip")},
    "sd2": {"text_encoder": ("cond_stage_model.model.", "open_clip")},
    "sdxl": {
        "text_encoder": ("conditioner.embedders.0.transformer.", "clip"),
        "text_encoder_2": ("conditioner.embedders.1.model.", "open_clip"),
    },
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP = {
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.token_embedding": "token_embedding", "final_layer_norm": "ln_final",
    "encoder.layers": "transformer.resblocks", "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj", "self_attn.out_proj": "attn.out_proj",
}  # fmt: skip


def original_state(parts: Mapping[str, Weights], family: str) -> dict[str, Tensor]:
    """All weights of a model of `family` under their original names.

    Args:
        parts: the weights of "unet", "vae", "text_encoder" and, for SDXL, "text_encoder_2"; those of text encoders
            have names that start with `text_model.` (or `text_projection`).

    Raises:
        UserError: a weight whose original name is not known.
    """
    state = {UNET_PREFIX + name: tensor for name, tensor in unet_state(parts["unet"]).items()}
    state |= {VAE_PREFIX + name: tensor for name, tensor in vae_state(parts["vae"]).items()}
    for component, (prefix, scheme) in TEXT_ENCODER_PREFIXES[family].items():
        weights = parts[component]
        text = open_clip_state(weights) if scheme == "open_clip" else dict(weights)
        state |= {prefix + name: tensor for name, tensor in text.items()}
    return state


def unet_state(weights: Weights) -> dict[str, Tensor]:
    """The UNet's weights under their original names; down blocks must have two resnets, up blocks three."""
    with_attention = {match[0] for name in weights if (match := re.match(r"up_blocks\.\d+(?=\.attentions)", name))}
    return {unet_name(name, with_attention): tensor for name, tensor in weights.items()}


def unet_name(name: str, with_attention: set[str]) -> str:
    """The original name of one of the UNet's weights; `with_attention` as in `original_name`.

    Raises:
        UserError: a weight whose original name is not known.
    """
    path, _, kind = name.rpartition(".")  # kind: "weight" or "bias"
    original = original_name(path, with_attention)
    if original is None:
        raise UserError(
            f"the UNet's weight {name[:120]} has no name in an original checkpoint: export a folder instead"
        )
    return f"{original}.{kind}"


def vae_state(weights: Weights) -> dict[str, Tensor]:
    """The autoencoder's weights under their original names."""
    up_blocks = 1 + max(int(match[1]) for name in weights if (match := re.match(r"decoder\.up_blocks\.(\d+)", name)))
    return {vae_name(name, up_blocks): _as_convolution(name, tensor) for name, tensor in weights.items()}


def vae_name(name: str, up_blocks: int) -> str:
    """The original name of one of the autoencoder's weights; there the decoder's up blocks are numbered backwards."""
    path, _, kind = name.rpartition(".")
    if match := re.fullmatch(r"(encoder|decoder)\.mid_block\.attentions\.0\.(.+)", path):
        return f"{match[1]}.mid.attn_1.{VAE_ATTENTION[match[2]]}.{kind}"
    path = re.sub(r"mid_block\.resnets\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}", path)
    path = re.sub(r"down_blocks\.(\d+)", r"down.\1", path)
    path = re.sub(r"up_blocks\.(\d+)", lambda match: f"up.{up_blocks - 1 - int(match[1])}", path)
    path = path.replace(".resnets.", ".block.").replace("downsamplers.0.", "downsample.")
    path = path.replace("upsamplers.0.", "upsample.").replace("conv_norm_out", "norm_out")
    return f"{path.replace('conv_shortcut', 'nin_shortcut')}.{kind}"


def _as_convolution(name: str, tensor: Tensor) -> Tensor:
    """A weight (out, in) of the middle attention as (out, in, 1, 1), a 1×1 convolution's; others as they are."""
    return tensor[..., None, None] if "mid_block.attentions" in name and tensor.ndim == 2 else tensor


def open_clip_state(weights: Weights) -> dict[str, Tensor]:
    """A text encoder's weights under OpenCLIP's names; q, k and v are joined, the text projection is transposed."""
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
    """OpenCLIP's name of a weight, for transformers' name without `text_model.`."""
    for ours, theirs in OPEN_CLIP.items():
        name = name.replace(ours, theirs)
    return name
