"""The layers that each family's models have: which family a set of modules fits, and which of them are convolutions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache

import torch
from torch import Tensor

from personalize.formats.reader_keys import TEXT_LAYERS, TEXT_MODULES
from personalize.models.config import FAMILIES, TEXT_ENCODERS
from personalize.models.empty import adaptable_layers, empty_unet

LATENT_CHANNELS = 4
ENCODERS = {"sd1": ("text_encoder",), "sd2": ("text_encoder",), "sdxl": TEXT_ENCODERS}


@cache
def kernels(family: str | None) -> dict[str, tuple[int, ...]]:
    """By module, the kernel's sides of a convolution, () of a linear layer; if None, where all families agree."""
    if family is None:
        first, *rest = (kernels(name) for name in FAMILIES)
        known = {module for names in (first, *rest) for module in names}
        return {module: kinds.pop() for module in known
                if len(kinds := {names[module] for names in (first, *rest) if module in names}) == 1}  # fmt: skip
    layers = {f"unet.{path}": tuple(layer.weight.shape[2:]) for path, layer in adaptable_layers(empty_unet(family))}
    for encoder in ENCODERS[family]:
        paths = (f"{encoder}.text_model.encoder.layers.{n}.{name}" for n in range(TEXT_LAYERS) for name in TEXT_MODULES)
        layers |= dict.fromkeys(paths, ())
    if family == "sdxl":
        layers["text_encoder_2.text_projection"] = ()
    return layers


@cache
def known_paths(family: str) -> frozenset[str]:
    """Every module of the family, norms and containers too."""
    unet = {f"unet.{path}" for path, _ in empty_unet(family).named_modules() if path}
    layers = [module for module in kernels(family) if not module.startswith("unet.")]
    norms = {f"{layer.partition('.self_attn.')[0]}.layer_norm{n}" for layer in layers for n in (1, 2)}
    norms |= {f"{encoder}.text_model.final_layer_norm" for encoder in ENCODERS[family]}
    return frozenset(unet | set(layers) | norms)


def fitting_families(modules: Iterable[str]) -> list[str]:
    """The families that have at least one of `modules`, the one with the most of them first."""
    modules = list(modules)
    counts = {family: sum(module in known_paths(family) for module in modules) for family in FAMILIES}
    return sorted((family for family in FAMILIES if counts[family]), key=lambda family: -counts[family])


def as_layer_wants(parts: Mapping[str, Tensor], module: str, family: str | None) -> dict[str, Tensor]:
    """The factors A and B with the number of dimensions of their layer: 2 of a linear layer, 4 of a convolution.

    1×1 convolutions and linear layers multiply the same matrices, and programs store them in either shape.
    """
    kernel = kernels(family).get(module)
    if kernel is None:
        return dict(parts)
    sides = {"A": kernel, "B": tuple(1 for _ in kernel)}
    return {role: with_kernel(tensor, sides[role]) if role in sides else tensor for role, tensor in parts.items()}


def with_kernel(tensor: Tensor, kernel: tuple[int, ...]) -> Tensor:
    """A factor (r, in·k·k) as (r, in, k, k), or (r, in, 1, 1) as (r, in); any other is returned as it is."""
    if kernel and tensor.ndim == 2 and tensor.shape[1] % (kernel[0] * kernel[1]) == 0:
        return tensor.reshape(len(tensor), -1, *kernel)
    if not kernel and tensor.ndim == 4 and tensor.shape[2:].numel() == 1:
        return tensor.flatten(1)
    return tensor


def fitted(a: Tensor, b: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """A and B with the dimensions of a layer whose weight is (out, in[, k, k]).

    A layer that reads more channels than A changes has them behind those of the layer that A was made for, as the
    first convolution of an inpainting UNet has the mask and the masked picture behind the latents: A is 0 there.
    """
    a, b = with_kernel(a, tuple(shape[2:])), with_kernel(b, tuple(1 for _ in shape[2:]))
    if len(shape) == 4 and a.ndim == 4 and a.shape[1] == LATENT_CHANNELS < shape[1]:
        a = torch.cat([a, a.new_zeros(len(a), shape[1] - a.shape[1], *a.shape[2:])], 1)
    return a, b
