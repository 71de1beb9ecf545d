"""An adapter's LoRA in ComfyUI's models: as weight patches, or masked at each step by its timestep-dependent rank."""

# pyright: reportMissingImports=false

from __future__ import annotations

from typing import Any

import comfy.lora
import comfy.utils
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from .adapter_folder import Adapter
from .forgetting import factors
from .timestep_rank import MaskedLora, TimestepMask

UNET = "unet."


def patched(model: Any, clip: Any, adapter: Adapter, strength: float, forget: str) -> tuple[Any, Any]:
    """Clones of `model` and `clip` with the adapter's LoRA times `strength`, and times the forgetting rules' factors.

    Raises:
        ValueError: the adapter is for a base of another family, or a forgetting rule is wrong.
    """
    model, clip = model.clone(), clip.clone()
    config = model.model.model_config.unet_config
    names = {key: f"diffusion_model.{value}" for key, value in comfy.utils.unet_to_diffusers(config).items()}
    targets = {f"{UNET}{key.removesuffix('.weight')}": value for key, value in names.items() if key.endswith(".weight")}
    targets |= comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {})
    weights = {**model.model.state_dict(), **clip.cond_stage_model.state_dict()}
    _check(adapter, targets, weights)
    paths = [module.removeprefix(UNET) for module in adapter.lora if module.startswith(UNET)]
    kept = factors(paths, forget, len(config["channel_mult"]))
    scales = {module: strength * kept.get(module.removeprefix(UNET), 1.0) for module in adapter.lora}
    scales = {module: scale for module, scale in scales.items() if scale}
    if adapter.timestep_rank is not None:
        unet = {module: scale for module, scale in scales.items() if module.startswith(UNET)}
        add_masked(model, adapter, unet, targets)
        scales = {module: scale for module, scale in scales.items() if module not in unet}
    tensors: dict[str, Tensor] = {}
    for module, scale in scales.items():
        down, up = adapter.lora[module]
        alpha = torch.tensor(scale * adapter.alpha, dtype=torch.float64)
        tensors |= {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up, f"{module}.alpha": alpha}
    patches = comfy.lora.load_lora(tensors, {module: targets[module] for module in scales})
    model.add_patches(patches)
    clip.add_patches(patches)
    return model, clip


def _check(adapter: Adapter, targets: dict[str, str], weights: dict[str, Tensor]) -> None:
    """ValueError unless every module of the adapter has a weight of its shape; ComfyUI would skip it silently."""
    for module, (down, up) in adapter.lora.items():
        weight = weights.get(targets.get(module, ""))
        if weight is None or (*up.shape[:1], *down.shape[1:]) != tuple(weight.shape):
            raise ValueError(f"this base has no layer {module} of the adapter's shape: load a base of its family")


def add_masked(model: Any, adapter: Adapter, scales: dict[str, float], targets: dict[str, str]) -> None:
    """Add the LoRA to layers of `model` such that at each step only the components of its timestep take part."""
    if not scales:
        return
    mask = TimestepMask(adapter.timestep_rank or {}, len(adapter.lora[next(iter(scales))][0]))
    for module, scale in scales.items():
        layer = targets[module].removesuffix(".weight")
        down, up = adapter.lora[module]
        masked = MaskedLora(model.get_model_object(layer), down, up, scale * adapter.alpha / len(down), mask)
        model.add_object_patch(f"{layer}.forward", masked.added_to(model.get_model_object(f"{layer}.forward")))
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, f"personalize-{id(mask)}", mask)
