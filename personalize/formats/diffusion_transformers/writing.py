"""A LoRA of a diffusion transformer in the spelling that a program reads.

Every alpha equals the rank, or is left out where readers then take it for the rank: strengths are multiplied into B,
because some readers ignore the alphas of some layers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
from torch import Tensor

from personalize.errors import UserError
from personalize.formats.adapter_folders import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from personalize.formats.diffusion_transformers.factors import Pair, fuse, halves_swapped, one_rank, outputs_of
from personalize.formats.diffusion_transformers.families import FAMILIES
from personalize.formats.diffusion_transformers.names import Layer, original_layers, spelled
from personalize.formats.diffusion_transformers.skeletons import shapes_of
from personalize.formats.lora_files import alpha_tensor, hashed_bytes
from personalize.io.tensor_files import tensor_bytes

ORIGINAL = {"kohya", "ComfyUI"}  # spellings by the layers of the original code


def tensors_in(pairs: Mapping[str, Pair], family: str, scheme: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a LoRA in the naming scheme "diffusers", "PEFT folder", "kohya", "ComfyUI" or "OneTrainer".

    Raises:
        UserError: a number too large for `dtype`.
    """
    layers = fused(pairs, family) if scheme in ORIGINAL else [(Layer.of(name), pair) for name, pair in pairs.items()]
    tensors: dict[str, Tensor] = {}
    for layer, (a, b) in layers:
        name = spelled(layer, family, scheme)
        down, up = ("lora_down", "lora_up") if scheme in ("kohya", "OneTrainer") else ("lora_A", "lora_B")
        tensors[f"{name}.{down}.weight"] = _cast(a, dtype, name)
        tensors[f"{name}.{up}.weight"] = _cast(b, dtype, name)
        if down == "lora_down":
            tensors[f"{name}.alpha"] = alpha_tensor(len(a), dtype)
    return tensors


def fused(pairs: Mapping[str, Pair], family: str) -> list[tuple[Layer, Pair]]:
    """The LoRA by the layers of the original code: fused projections, halves of outputs in their order."""
    made = []
    for layer in original_layers(family):
        own = [pairs.get(name) for name in layer.layers]
        given = next((pair for pair in own if pair is not None), None)
        if given is None:
            continue
        inputs = given[0][0].numel()
        sizes = outputs_of([shapes_of(family, name)[0] for name in layer.layers], inputs, None, layer.path)
        sizes = [size if pair is None else len(pair[1]) for size, pair in zip(sizes, own, strict=True)]
        pair = fuse(own, sizes)
        made.append((layer, halves_swapped(pair) if layer.swapped else pair))
    return made


def _cast(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """The tensor in `dtype`; UserError if a number becomes infinite."""
    cast = tensor.to(dtype).contiguous()
    if not bool(cast.isfinite().all()):
        raise UserError(f"layer {name} has a number too large for {dtype}: use --dtype bfloat16 or float32")
    return cast


def diffusers_file(pairs: Mapping[str, Pair], family: str, dtype: torch.dtype) -> bytes:
    """The bytes of a file that diffusers loads: PEFT's names, one rank, and settings that say alpha = rank."""
    same, rank = one_rank(pairs)
    settings: dict[str, object] = {}
    for part in sorted({name.partition(".")[0] for name in same}):
        own = sorted(name.partition(".")[2] for name in same if name.startswith(f"{part}."))
        settings |= {f"{part}.r": rank, f"{part}.lora_alpha": rank, f"{part}.target_modules": own}
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(settings, sort_keys=True)}
    return tensor_bytes(tensors_in(same, family, "diffusers", dtype), metadata)


def kohya_file(pairs: Mapping[str, Pair], family: str, dtype: torch.dtype, metadata: Mapping[str, str]) -> bytes:
    """The bytes of a file for graphical programs: kohya's names of the original code's layers, an alpha for each."""
    kept = {key: value for key, value in metadata.items() if key.startswith(("ss_", "modelspec."))}
    ranks = {len(a) for a, _ in pairs.values()}
    kept |= {"format": "pt", "ss_network_module": "networks.lora", "ss_network_args": "{}"}
    kept |= {"ss_network_dim": str(max(ranks)), "ss_network_alpha": str(max(ranks))}
    kept.setdefault("ss_base_model_version", FAMILIES[family].stated[0])
    return hashed_bytes(tensors_in(pairs, family, "kohya", dtype), kept)


def peft_folder(pairs: Mapping[str, Pair], family: str, dtype: torch.dtype) -> dict[str, bytes]:
    """PEFT's two files of the transformer's LoRA, name → bytes.

    Raises:
        UserError: layers of text encoders, for which PEFT has a folder of its own each.
    """
    if others := [name for name in pairs if not name.startswith("transformer.")]:
        raise UserError(f"PEFT's folder holds the transformer alone, not {others[0]} too: add --unet_only")
    same, rank = one_rank(pairs)
    settings = {"peft_type": "LORA", "task_type": None, "r": rank, "lora_alpha": rank, "bias": "none",
                "target_modules": [name.partition(".")[2] for name in same], "inference_mode": True,
                "base_model_name_or_path": None}  # fmt: skip
    tensors = tensors_in(same, family, "PEFT folder", dtype)
    return {ADAPTER_CONFIG: (json.dumps(settings, indent=2) + "\n").encode(),
            ADAPTER_WEIGHTS: tensor_bytes(tensors, {"format": "pt"})}  # fmt: skip
