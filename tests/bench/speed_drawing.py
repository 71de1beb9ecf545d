"""The parts of the speed bench that draw: one guided call with each short cut, a picture, a grid of edits."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch import Tensor

from personalize.lean import fast_paths, in_precision, shared_guidance_prefix
from personalize.lora import add_lora, module_names, remove_lora
from personalize.model import Conditioning, StableDiffusion
from personalize.moves import make_schedule
from personalize.sampling import Edit, denoise, initial_latents
from tests.bench.arms import Arm
from tests.bench.speed_setup import Rows, channels_last, combined, latents, model_of, timed

if TYPE_CHECKING:
    from tests.bench.speed import SpeedBench


def call(bench: SpeedBench) -> Rows:
    """One call of the UNet for one guided picture: two calls, one batch of two, each short cut alone and together."""
    model = model_of(bench)
    unet, z = model.unet, latents(model, 1, bench.latent)
    told = prompt_conditioning(model)
    both, two = Conditioning.cat([told[:1], told[1:]]), torch.cat([z, z])

    @torch.no_grad()
    def one_batch() -> Tensor:
        return model.predict(two, 500, both)

    @torch.no_grad()
    def two_calls() -> None:
        model.predict(z, 500, told[:1])
        model.predict(z, 500, told[1:])

    arms = [
        Arm("one batch of two", one_batch),
        Arm("two calls", two_calls),
        Arm("fast paths", one_batch, lambda: fast_paths(unet)),
        Arm("shared prefix", one_batch, lambda: shared_guidance_prefix(unet)),
        Arm("keys and values of the text kept", one_batch, lambda: text_projections_cached(unet)),
        Arm("channels last", one_batch, lambda: channels_last(unet)),
        Arm("fast paths, shared prefix", one_batch, combined(lambda: fast_paths(unet),
                                                            lambda: shared_guidance_prefix(unet))),
        Arm("the same in bf16", one_batch, combined(lambda: in_precision(unet, torch.bfloat16),
                                                   lambda: fast_paths(unet), lambda: shared_guidance_prefix(unet))),
    ]  # fmt: skip
    return timed(bench, "guided call", arms)


def prompt_conditioning(model: StableDiffusion) -> Conditioning:
    with torch.no_grad():
        return model.prompts(["", "a photo of a cat"])


@contextmanager
def text_projections_cached(unet: Any):
    """Run the body with the text's keys and values computed at the first call and kept: for prompts that stay."""
    layers = [
        layer for attention in unet.modules() if getattr(attention, "is_cross_attention", False)
        for layer in (attention.to_k, attention.to_v)
    ]  # fmt: skip
    kept: dict[int, Tensor] = {}

    def once(number: int, forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda text: kept[number] if number in kept else kept.setdefault(number, forward(text))

    for number, layer in enumerate(layers):
        layer.forward = once(number, layer.forward)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def pictures(bench: SpeedBench) -> Rows:
    """A whole guided picture of 30 steps, decoded, as `Editor` draws it: fp32 as diffusers does it, ours, bf16."""
    model = model_of(bench)
    edit = Edit(prompt_conditioning(model)[1:])
    plan = make_schedule(model, 30)
    start = initial_latents(model, [0], None)

    def draw() -> None:
        model.decode(denoise(model, start, edit, plan))

    def stock() -> Any:
        names = ("fast_paths", "shared_guidance_prefix")
        as_it_is: dict[str, Any] = dict.fromkeys(names, lambda *_, **__: nullcontext())
        return patch.multiple("personalize.sampling", **as_it_is)

    arms = [
        Arm("30 steps, as diffusers does", draw, stock),
        Arm("30 steps, ours", draw),
        Arm("30 steps, ours, bf16", draw, lambda: in_precision(model.unet, torch.bfloat16)),
    ]
    return timed(bench, "picture", arms, groups=max(2, bench.groups // 4), warmup=0)


def grid(bench: SpeedBench) -> Rows:
    """Eight edits by one adapter: a picture at a time, and all in one batch; milliseconds are per edit and step."""
    model, count, steps = model_of(bench), 8, 2
    add_lora(model.unet, module_names(model.unet), bench.rank, bench.rank, seed=0)
    try:
        told = prompt_conditioning(model)[1:]
        start = latents(model, count, bench.latent)
        plan = make_schedule(model, steps)

        def single() -> None:
            for row in range(count):
                denoise(model, start[row : row + 1], Edit(told), plan)

        def whole() -> None:
            denoise(model, start, Edit(told), plan)

        arms = [Arm("one at a time", single), Arm("one batch of 8", whole)]
        return timed(bench, "grid of edits", arms, per=count * steps)
    finally:
        remove_lora(model.unet)
