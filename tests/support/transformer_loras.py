"""Tiny random diffusion transformers of every family, and LoRAs on all of their layers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from personalize.models.empty import adaptable_layers

Pairs = dict[str, tuple[Tensor, Tensor]]
ROPE = (4, 6, 6)  # of 16 numbers for each head
HEADS = {"attention_head_dim": 16, "num_attention_heads": 2}
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "flux1": ("FluxTransformer2DModel", HEADS | {"in_channels": 8, "num_layers": 2, "num_single_layers": 2,
              "joint_attention_dim": 24, "pooled_projection_dim": 20, "guidance_embeds": True,
              "axes_dims_rope": ROPE}),
    "flux2": ("Flux2Transformer2DModel", HEADS | {"in_channels": 8, "num_layers": 2, "num_single_layers": 2,
              "joint_attention_dim": 24, "timestep_guidance_channels": 16, "axes_dims_rope": (4, 4, 4, 4)}),
    "z-image": ("ZImageTransformer2DModel", {"in_channels": 4, "dim": 32, "n_layers": 2, "n_refiner_layers": 1,
                "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 24, "axes_dims": list(ROPE), "axes_lens": [64, 64, 64]}),
    "qwen-image": ("QwenImageTransformer2DModel", HEADS | {"in_channels": 8, "out_channels": 2, "num_layers": 2,
                   "joint_attention_dim": 24, "axes_dims_rope": ROPE}),
    "krea2": ("Krea2Transformer2DModel", HEADS | {"in_channels": 8, "num_layers": 2, "num_key_value_heads": 1,
              "intermediate_size": 40, "timestep_embed_dim": 16, "text_hidden_dim": 24, "num_text_layers": 3,
              "text_num_attention_heads": 2, "text_num_key_value_heads": 2, "text_intermediate_size": 28,
              "num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1, "axes_dims_rope": ROPE}),
    "anima": ("CosmosTransformer3DModel", HEADS | {"in_channels": 4, "out_channels": 4, "num_layers": 2,
              "text_embed_dim": 24, "adaln_lora_dim": 8, "max_size": (4, 16, 16), "extra_pos_embed_type": None,
              "concat_padding_mask": False}),
    "sd3": ("SD3Transformer2DModel", {"sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 2,
            "attention_head_dim": 64, "num_attention_heads": 2, "joint_attention_dim": 24,
            "caption_projection_dim": 128, "pooled_projection_dim": 20, "pos_embed_max_size": 8,
            "dual_attention_layers": (0,), "qk_norm": "rms_norm"}),
    "chroma": ("ChromaTransformer2DModel", HEADS | {"in_channels": 8, "num_layers": 2, "num_single_layers": 2,
               "joint_attention_dim": 24, "axes_dims_rope": ROPE, "approximator_num_channels": 8,
               "approximator_hidden_dim": 12, "approximator_layers": 2}),
}  # fmt: skip
FAMILIES = tuple(SETTINGS)


@cache
def _tiny(family: str) -> nn.Module:
    import diffusers

    name, settings = SETTINGS[family]
    torch.manual_seed(0)
    model = getattr(diffusers, name)(**settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # many layers of these models begin at zero
            parameter.normal_(0, 0.1)
    return model


def tiny_transformer(family: str) -> nn.Module:
    """A new tiny transformer of the family, the same at each call."""
    return copy.deepcopy(_tiny(family))


def shapes(family: str, want: Callable[[str], bool] = lambda path: True) -> dict[str, torch.Size]:
    """The shapes of the layers of the tiny transformer, by diffusers' path."""
    return {path: layer.weight.shape for path, layer in adaptable_layers(_tiny(family)) if want(path)}


def random_pairs(sizes: dict[str, torch.Size], rank: int = 2, part: str = "transformer", seed: int = 1) -> Pairs:
    """A LoRA on layers of these shapes."""
    noise = torch.Generator().manual_seed(seed)
    pairs = {}
    for path, (out, *read) in sizes.items():
        a = torch.randn(rank, *read, generator=noise)
        pairs[f"{part}.{path}"] = (a, torch.randn(out, rank, *(1 for _ in read[1:]), generator=noise) * 0.3)
    return pairs


def update(pair: tuple[Tensor, Tensor]) -> Tensor:
    """ΔW (out, in·k·k)."""
    return pair[1].flatten(1) @ pair[0].flatten(1)


def merged(family: str, pairs: Pairs) -> nn.Module:
    """The tiny transformer with every ΔW added to its weights."""
    model = tiny_transformer(family)
    with torch.no_grad():
        for path, layer in adaptable_layers(model):
            if f"transformer.{path}" in pairs:
                layer.weight += update(pairs[f"transformer.{path}"]).view_as(layer.weight)
    return model


@torch.no_grad()
def prediction(family: str, model: nn.Module) -> Tensor:
    """What the tiny transformer predicts for fixed random inputs."""
    noise = torch.Generator().manual_seed(5)
    return PREDICTIONS[family](model, lambda *size: torch.randn(*size, generator=noise))


def _inputs(random: Callable[..., Tensor], image: tuple[int, ...] = (1, 4, 8)) -> dict[str, Tensor]:
    return {"hidden_states": random(*image), "encoder_hidden_states": random(1, 3, 24), "timestep": torch.tensor([0.5])}


def _flux1(model: Any, random: Callable[..., Tensor]) -> Tensor:
    ids = {"img_ids": torch.zeros(4, 3), "txt_ids": torch.zeros(3, 3), "guidance": torch.tensor([3.5])}
    return model(**_inputs(random), pooled_projections=random(1, 20), **ids).sample


def _flux2(model: Any, random: Callable[..., Tensor]) -> Tensor:
    ids = {"img_ids": torch.zeros(4, 4), "txt_ids": torch.zeros(3, 4), "guidance": torch.tensor([3.5])}
    return model(**_inputs(random), **ids).sample


def _z_image(model: Any, random: Callable[..., Tensor]) -> Tensor:
    return model([random(4, 1, 4, 4)], torch.tensor([0.5]), [random(3, 24)]).sample[0]


def _qwen_image(model: Any, random: Callable[..., Tensor]) -> Tensor:
    return model(**_inputs(random), encoder_hidden_states_mask=torch.ones(1, 3), img_shapes=[[(1, 2, 2)]]).sample


def _krea2(model: Any, random: Callable[..., Tensor]) -> Tensor:
    inputs = _inputs(random) | {"encoder_hidden_states": random(1, 3, 3, 24), "position_ids": torch.zeros(7, 3)}
    return model(**inputs).sample


def _anima(model: Any, random: Callable[..., Tensor]) -> Tensor:
    return model(**_inputs(random, (1, 4, 1, 4, 4))).sample


def _sd3(model: Any, random: Callable[..., Tensor]) -> Tensor:
    return model(**_inputs(random, (1, 4, 8, 8)), pooled_projections=random(1, 20)).sample


def _chroma(model: Any, random: Callable[..., Tensor]) -> Tensor:
    return model(**_inputs(random), img_ids=torch.zeros(4, 3), txt_ids=torch.zeros(3, 3)).sample


PREDICTIONS: dict[str, Callable[[Any, Callable[..., Tensor]], Tensor]] = {
    "flux1": _flux1, "flux2": _flux2, "z-image": _z_image, "qwen-image": _qwen_image, "krea2": _krea2,
    "anima": _anima, "sd3": _sd3, "chroma": _chroma,
}  # fmt: skip
