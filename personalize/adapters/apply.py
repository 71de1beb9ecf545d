"""Put adapters into a base model for the length of a `with` block."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from personalize.adapters.adapter import Adapter
from personalize.adapters.lora import PREFIX
from personalize.adapters.merging import merged, plain
from personalize.adapters.textual_inversion import installed_tokens
from personalize.errors import Notice
from personalize.models.stable_diffusion import StableDiffusion
from personalize.models.transfer import sent


@contextmanager
def applied(
    model: StableDiffusion, adapter: Adapter | None, text_strength: float = 1.0, *, any_base: bool = False
) -> Iterator[None]:
    """Run the body with the whole adapter applied: LoRA of UNet and text encoders, and learned tokens.

    Afterwards `model` is as before. Without an adapter nothing is changed. `text_strength` is a factor on the LoRA of
    the text encoders and on changes of other algorithms in any part; `any_base` allows another base of the adapter's
    family.
    """
    with ExitStack() as stack:
        if adapter is not None:
            stack.enter_context(adapter.apply(model, any_base=any_base, strength=text_strength))
            stack.enter_context(applied_text(model, adapter, text_strength))
        yield


@contextmanager
def applied_text(model: StableDiffusion, adapter: Adapter, strength: float = 1.0) -> Iterator[None]:
    """Run the body with what the adapter changes in the reading of prompts: LoRA of text encoders, learned tokens."""
    with adapter.apply_text(model, strength), installed_tokens(model, adapter.concepts):
        yield


class AdapterCopy:
    """Keeps an adapter's copy on a model's device, so that it is copied once and not each time it is applied."""

    def __init__(self) -> None:
        self._kept: tuple[Adapter, torch.device, Adapter] | None = None

    def of(self, adapter: Adapter, device: torch.device) -> Adapter:
        """`adapter` with the UNet's LoRA on `device`."""
        if self._kept is None or self._kept[0] is not adapter or self._kept[1] != device:
            lora = {key: sent(part, device) if key.startswith(PREFIX) else part for key, part in adapter.lora.items()}
            self._kept = adapter, device, replace(adapter, lora=lora)
        return self._kept[2]


def load_adapters(folder: str | Path | Sequence[str | Path]) -> Adapter:
    """Load the adapter in `folder`, or the sum of those in several folders; UserError if they do not fit together.

    A Notice says which changes of biases and norms stay behind, for a sum of LoRAs holds none.
    """
    if isinstance(folder, str | Path):
        return Adapter.load(folder)
    adapters = [Adapter.load(one) for one in folder]
    if len(adapters) == 1:
        return adapters[0]
    for number, (adapter, name) in enumerate(zip(adapters, folder, strict=True)):
        adapters[number], lines = plain(adapter)
        for line in lines:
            warnings.warn(f"{name}: {line}", Notice, stacklevel=2)
    return merged(adapters, [1.0] * len(adapters), [str(one) for one in folder], in_memory=True)
