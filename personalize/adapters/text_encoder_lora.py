"""The text encoders' part of a LoRA: training it as layers, and adding it to the weights while prompts are encoded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from personalize.adapters.lora import add_lora, lora_state, remove_lora
from personalize.errors import UserError
from personalize.models.stable_diffusion import StableDiffusion

COMPONENTS = ("text_encoder", "text_encoder_2")
_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
_TRAINED = {"attention": _ATTENTION, "full": (*_ATTENTION, "fc1", "fc2")}  # as `lora.module_names` calls its sets


def has_text(lora: Mapping[str, Tensor]) -> bool:
    """Whether the LoRA (tensors named as in our adapter files) changes a text encoder."""
    return any(key.startswith("text_encoder") for key in lora)


def add_text_lora(model: StableDiffusion, rank: int, alpha: float, seed: int, targets: str = "full") -> None:
    """Add a new trainable LoRA to the text encoders' layers, in all blocks that the conditioning depends on.

    SDXL takes the hidden states before the last block of its first encoder, so that block would get no gradient and is
    left out.

    Args:
        targets: "attention" for the attention projections alone, "full" for the MLPs' layers too.

    Raises:
        UserError: a text encoder already carries an adapter.
    """
    for component, encoder in zip(COMPONENTS, model.text_encoders, strict=False):
        unused = None
        if model.family == "sdxl" and component == COMPONENTS[0]:
            unused = f".layers.{encoder.config.num_hidden_layers - 1}."
        names = [
            path
            for path, layer in encoder.named_modules()
            if isinstance(layer, nn.Linear) and path.endswith(_TRAINED[targets]) and not (unused and unused in path)
        ]
        add_lora(encoder, names, rank, alpha, seed, f"{component}.")


def text_lora_state(model: StableDiffusion) -> dict[str, Tensor]:
    """Copies of the text encoders' LoRA tensors, named "text_encoder.text_model.<path>.lora_A.weight", …"""
    state = {}
    for component, encoder in zip(COMPONENTS, model.text_encoders, strict=False):
        for key, tensor in lora_state(encoder, "").items():
            state[f"{component}.text_model.{key.removeprefix('text_model.')}"] = tensor
    return state


def remove_text_lora(model: StableDiffusion) -> None:
    """Put the text encoders' original layers back; does nothing if there is no adapter."""
    for encoder in model.text_encoders:
        remove_lora(encoder)


@contextmanager
def text_lora(model: StableDiffusion, lora: Mapping[str, Tensor], strength: float) -> Iterator[None]:
    """Run the body with weights W + strength · B A in the text encoders; afterwards all weights are restored exactly.

    Raises:
        UserError: `lora` has a module that the text encoders lack, or one of another shape.
    """
    before: list[tuple[Tensor, Tensor]] = []
    try:
        with torch.no_grad():
            for component, encoder in zip(COMPONENTS, model.text_encoders, strict=False):
                layers = {path.removeprefix("text_model."): layer for path, layer in encoder.named_modules()}
                for path, (a, b) in _pairs(lora, component).items():
                    weight = _weight(layers.get(path), f"{component}.{path}")
                    change = strength * (b.float().flatten(1) @ a.float().flatten(1))
                    if change.shape != weight.shape:
                        raise UserError(
                            f"adapter module {component}.{path} changes {tuple(change.shape)}, this base has "
                            f"{tuple(weight.shape)}: it was made for another base"
                        )
                    before.append((weight, weight.clone()))
                    weight += change.to(weight)
        yield
    finally:
        with torch.no_grad():
            for weight, old in reversed(before):
                weight.copy_(old)


def _pairs(lora: Mapping[str, Tensor], component: str) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of every module of one text encoder, by the module's path."""
    start, end = f"{component}.text_model.", ".lora_A.weight"
    names = [key[len(start) : -len(end)] for key in lora if key.startswith(start) and key.endswith(end)]
    return {name: (lora[f"{start}{name}{end}"], lora[f"{start}{name}.lora_B.weight"]) for name in names}


def _weight(layer: nn.Module | None, name: str) -> Tensor:
    if not isinstance(layer, nn.Linear):
        raise UserError(f"this base has no layer {name}: the adapter was made for another base model")
    return layer.weight.data
