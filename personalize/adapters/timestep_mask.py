"""Timestep-dependent rank in a UNet: masks the rank components of its LoRA layers at every forward pass.

    y = W x + s · B (m(t) ⊙ A x)          m(t) (b, R): a row for each sample, or one for all

The rule and its sources are in `formats.timestep_rank`.  The timestep is read from the UNet's own arguments, so that
the rule holds in training, in sampling and in pipelines of diffusers alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from personalize.adapters.lora import ADAPTER, lora_layers
from personalize.adapters.rank_mask import RankMask
from personalize.errors import UserError
from personalize.formats.timestep_rank import AnyTimestepRank
from personalize.models.transfer import on_device, sent


@contextmanager
def timestep_mask(unet: nn.Module, rule: AnyTimestepRank | None) -> Iterator[None]:
    """Run the body with the LoRA layers of `unet` masked by `rule` at each timestep; None masks nothing.

    Forgetting rules and strengths multiply with it.  A timestep that is no whole number counts as the nearest one.

    Raises:
        UserError: the layers' rank is no multiple of the rule's.
    """
    layers = {} if rule is None else lora_layers(unet)
    if rule is None or not layers:
        yield
        return
    rank = next(iter(layers.values())).r[ADAPTER]
    if rank % rule.rank:
        raise UserError(f"the LoRA has rank {rank}, its timestep-dependent rank is for {rule.rank}: files are mixed up")
    mask, table = RankMask(repr(rule)), torch.tensor(rule.masks()).repeat(1, rank // rule.rank)  # (T + 1, R)

    def select(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal table
        sample = args[0] if args else kwargs["sample"]
        timestep = args[1] if len(args) > 1 else kwargs["timestep"]
        table = sent(table, sample.device)
        rows = on_device(timestep, sample.device).reshape(-1).round().long()
        mask.value = table[rows.clamp(0, len(table) - 1)]

    with ExitStack() as stack:
        stack.callback(unet.register_forward_pre_hook(select, with_kwargs=True).remove)
        for layer in layers.values():
            stack.enter_context(_masked(layer, mask))
        yield


@contextmanager
def _masked(layer: Any, mask: RankMask) -> Iterator[None]:
    """Run the body with `mask` on one layer; its hook serves where the layer computes its sum by peft's own code."""

    def after_a(_: nn.Module, args: Any, u: Tensor) -> Tensor:
        return mask.apply(u, channels_first=u.ndim == 4)

    before = getattr(layer, "_mask", None)
    handle = layer.lora_A[ADAPTER].register_forward_hook(after_a)
    layer._mask = mask
    try:
        yield
    finally:
        layer._mask = before
        handle.remove()
