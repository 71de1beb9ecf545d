"""A converted LoRA of a diffusion transformer is read back, and by diffusers, before it is saved."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from personalize.errors import UserError
from personalize.formats.adapter_source import open_adapter
from personalize.formats.diffusion_transformers.factors import Pair
from personalize.formats.diffusion_transformers.readers import CLOSE, deviation, through_diffusers
from personalize.formats.diffusion_transformers.reading import TransformerLora, read


def require_same(path: Path, expected: Mapping[str, Pair], family: str, dtype: torch.dtype, *, asked: bool) -> None:
    """UserError unless the file at `path` gives every ΔW of `expected`.

    Args:
        path: the file, or PEFT's folder.
        expected: A and B by layer.
        family: the family of diffusion transformers.
        dtype: of the numbers in the file, which decides on the tolerance.
        asked: that diffusers' converter must give them too.
    """
    content = open_adapter(path)
    found = read(path, content, family)
    changed = {name: pair for name, pair in expected.items() if bool(pair[1].any()) and bool(pair[0].any())}
    wrong = [name for name in changed if name not in found.pairs
             or deviation(found.pairs[name], expected[name]) > CLOSE[dtype]]  # fmt: skip
    wrong += [name for name in found.pairs if name not in expected]
    if wrong:
        raise UserError(f"the result does not give back layer {wrong[0]}: please report this file")
    reading = through_diffusers(content, found) if asked else None
    if reading is not None and reading.verdict[0] != "yes":
        raise UserError(f"diffusers does not read the result as it is meant: it {reading.verdict[1]}; please report it")


def transformer_alone(lora: TransformerLora, name: object) -> TransformerLora:
    """The LoRA without its layers in text encoders; UserError if that leaves nothing."""
    pairs = {layer: pair for layer, pair in lora.pairs.items() if not layer.startswith("text_")}
    if not pairs:
        raise UserError(f"{name} changes text encoders alone: leave --unet_only out")
    return TransformerLora(lora.family, pairs, lora.left, lora.metadata)
