"""The text encoders' part of a LoRA, added to their weights while a prompt is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from personalize.errors import UserError
from personalize.model import StableDiffusion

COMPONENTS = ("text_encoder", "text_encoder_2")


def has_text(lora: Mapping[str, Tensor]) -> bool:
    """Does the LoRA (house's names) change a text encoder?"""
    return any(key.startswith("text_encoder") for key in lora)


@contextmanager
def text_lora(model: StableDiffusion, lora: Mapping[str, Tensor], strength: float) -> Iterator[None]:
    """Run the body with W + strength · B A in the text encoders; afterwards every weight is what it was, bit for bit.

    Raises:
        UserError: a module that the text encoders do not have, or one of another shape.
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
    start, end = f"{component}.text_model.", ".lora_A.weight"
    names = [key[len(start) : -len(end)] for key in lora if key.startswith(start) and key.endswith(end)]
    return {name: (lora[f"{start}{name}{end}"], lora[f"{start}{name}.lora_B.weight"]) for name in names}


def _weight(layer: nn.Module | None, name: str) -> Tensor:
    if not isinstance(layer, nn.Linear):
        raise UserError(f"this base has no layer {name}: the adapter was made for another base model")
    return layer.weight.data
