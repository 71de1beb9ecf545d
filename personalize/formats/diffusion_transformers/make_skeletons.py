"""Write `skeletons.json`: every layer of the released diffusion transformers, without a weight of any of them.

    python -m personalize.formats.diffusion_transformers.make_skeletons

The models are built by diffusers and transformers on the meta device from the settings of the released models; where
a setting is not given here, it is diffusers' default, which is that of the model the class was made for.
"""

from __future__ import annotations

import json
from typing import Any

import torch

from personalize.formats.diffusion_transformers.skeletons import FILE, Shape, compressed
from personalize.models.empty import CONFIGS, adaptable_layers

Settings = dict[str, Any]
KLEIN: Settings = {"guidance_embeds": False}
SD3: Settings = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536}
MODELS: dict[str, dict[str, tuple[str, Settings]]] = {
    "flux1": {"FLUX.1": ("FluxTransformer2DModel", {"guidance_embeds": True})},
    "flux2": {
        "FLUX.2": ("Flux2Transformer2DModel", {}),
        "FLUX.2 klein 9B": ("Flux2Transformer2DModel", KLEIN | {"num_layers": 8, "num_single_layers": 24,
                            "num_attention_heads": 32, "joint_attention_dim": 12288}),
        "FLUX.2 klein 4B": ("Flux2Transformer2DModel", KLEIN | {"num_layers": 5, "num_single_layers": 20,
                            "num_attention_heads": 24, "joint_attention_dim": 7680}),
    },
    "z-image": {"Z-Image": ("ZImageTransformer2DModel", {})},
    "qwen-image": {"Qwen-Image": ("QwenImageTransformer2DModel", {})},
    "krea2": {"Krea 2": ("Krea2Transformer2DModel", {})},
    "anima": {"Anima": ("CosmosTransformer3DModel", {"num_attention_heads": 16, "extra_pos_embed_type": None})},
    "sd3": {
        "SD 3 medium": ("SD3Transformer2DModel", SD3),
        "SD 3.5 medium": ("SD3Transformer2DModel", SD3 | {"dual_attention_layers": tuple(range(13)),
                          "qk_norm": "rms_norm"}),
        "SD 3.5 large": ("SD3Transformer2DModel", SD3 | {"num_layers": 38, "num_attention_heads": 38,
                         "caption_projection_dim": 2432, "qk_norm": "rms_norm"}),
    },
    "chroma": {"Chroma": ("ChromaTransformer2DModel", {})},
}  # fmt: skip
CLIP_L, CLIP_G, T5, CONDITIONER = "sd15/text_encoder", "sdxl/text_encoder_2", "T5-XXL", "AnimaTextConditioner"
ENCODERS = {
    "flux1": {"text_encoder": CLIP_L, "text_encoder_2": T5},
    "sd3": {"text_encoder": CLIP_L, "text_encoder_2": CLIP_G, "text_encoder_3": T5},
    "chroma": {"text_encoder": T5},
    "anima": {"text_conditioner": CONDITIONER},
}


def main() -> None:
    """Build every model and write the names and shapes of its layers."""
    found = {
        family: {
            title: compressed(layers("transformer", transformer(*made)) | _encoder_layers(family))
            for title, made in models.items()
        }
        for family, models in MODELS.items()
    }
    FILE.write_text(json.dumps(found, separators=(",", ":")).replace('],"', '],\n"') + "\n", encoding="utf-8")


def transformer(name: str, settings: Settings) -> torch.nn.Module:
    """A transformer of diffusers without weights, by the name of its class."""
    import diffusers

    with torch.device("meta"):
        return getattr(diffusers, name)(**settings)


def layers(part: str, model: torch.nn.Module) -> dict[str, Shape]:
    """Every linear layer and convolution by "<part>.<path>", with its weight's shape."""
    return {f"{part}.{path}": tuple(layer.weight.shape) for path, layer in adaptable_layers(model)}


def _encoder_layers(family: str) -> dict[str, Shape]:
    """The layers of the family's text encoders, whose paths start with `text_model.` in CLIP."""
    found: dict[str, Shape] = {}
    for part, kind in ENCODERS.get(family, {}).items():
        for name, shape in layers(part, _encoder(kind)).items():
            path = name.removeprefix(f"{part}.")
            nested = kind in (T5, CONDITIONER) or path.startswith(("text_model.", "text_projection"))
            found[name if nested else f"{part}.text_model.{path}"] = shape
    return found


def _encoder(kind: str) -> torch.nn.Module:
    """A text encoder without weights."""
    import transformers

    if kind == CONDITIONER:
        return transformer(kind, {})
    with torch.device("meta"):
        if kind == T5:
            sizes: Settings = {"d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_heads": 64, "num_layers": 24}
            return transformers.T5EncoderModel(transformers.T5Config(**sizes, feed_forward_proj="gated-gelu"))
        made = transformers.CLIPTextModel if kind == CLIP_L else transformers.CLIPTextModelWithProjection
        return made(transformers.CLIPTextConfig.from_pretrained(CONFIGS / kind))


if __name__ == "__main__":
    main()
