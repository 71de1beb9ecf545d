"""The parts of the speed bench about sampling: one guided call of the UNet, a whole picture, several edits."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch import Tensor

from personalize.adapters.lora import add_lora, module_names, remove_lora
from personalize.models.fast_paths import fast_paths, in_precision, shared_guidance_prefix
from personalize.models.stable_diffusion import Conditioning, StableDiffusion
from personalize.sampling.denoise import Edit, denoise, initial_latents
from personalize.sampling.schedule import make_schedule
from tests.bench.speed.arms import Arm
from tests.bench.speed.setup import Rows, channels_last, combined, latents, model_of, timed

if TYPE_CHECKING:
    from tests.bench.speed.bench import SpeedBench


def call(bench: SpeedBench) -> Rows:
    """One guided prediction: as two calls, as one batch of two, with each optimisation alone and with all."""
    model = model_of(bench)
    unet, z = model.unet, latents(model, 1, bench.latent)
    null, prompt = (prompt_conditioning(model)[row : row + 1] for row in range(2))
    both, two = Conditioning.cat([null, prompt]), torch.cat([z, z])

    @torch.no_grad()
    def one_batch() -> Tensor:
        return model.predict(two, 500, both)

    @torch.no_grad()
    def two_calls() -> None:
        model.predict(z, 500, null)
        model.predict(z, 500, prompt)

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
    """The conditioning of the empty prompt and of a prompt, as two rows."""
    with torch.no_grad():
        return model.prompts(["", "a photo of a cat"])


@contextmanager
def text_projections_cached(unet: Any):
    """Run the body with cross-attention's keys and values computed once and reused, for prompts that do not change."""
    layers = [
        layer for attention in unet.modules() if getattr(attention, "is_cross_attention", False)
        for layer in (attention.to_k, attention.to_v)
    ]  # fmt: skip
    cache: dict[int, Tensor] = {}

    def once(number: int, forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda text: cache[number] if number in cache else cache.setdefault(number, forward(text))

    for number, layer in enumerate(layers):
        layer.forward = once(number, layer.forward)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def pictures(bench: SpeedBench) -> Rows:
    """A guided picture of 30 steps with decoding: without our optimisations, with them, and with them in bf16."""
    model = model_of(bench)
    edit = Edit(prompt_conditioning(model)[1:])
    plan = make_schedule(model, 30)
    start = initial_latents(model, [0], None)

    def draw() -> None:
        model.decode(denoise(model, start, edit, plan))

    def stock() -> Any:
        names = ("fast_paths", "shared_guidance_prefix")
        off: dict[str, Any] = dict.fromkeys(names, lambda *_, **__: nullcontext())
        return patch.multiple("personalize.sampling.denoise", **off)

    arms = [
        Arm("30 steps, as diffusers does", draw, stock),
        Arm("30 steps, ours", draw),
        Arm("30 steps, ours, bf16", draw, lambda: in_precision(model.unet, torch.bfloat16)),
    ]
    return timed(bench, "picture", arms, groups=max(2, bench.groups // 4), warmup=0)


def grid(bench: SpeedBench) -> Rows:
    """Eight edits by one adapter: one picture at a time, and all in one batch; milliseconds are per edit and step."""
    model, count, steps = model_of(bench), 8, 2
    add_lora(model.unet, module_names(model.unet), bench.rank, bench.rank, seed=0)
    try:
        prompt = prompt_conditioning(model)[1:]
        start = latents(model, count, bench.latent)
        plan = make_schedule(model, steps)

        def single() -> None:
            for row in range(count):
                denoise(model, start[row : row + 1], Edit(prompt), plan)

        def whole() -> None:
            denoise(model, start, Edit(prompt), plan)

        arms = [Arm("one at a time", single), Arm("one batch of 8", whole)]
        return timed(bench, "grid of edits", arms, per=count * steps)
    finally:
        remove_lora(model.unet)
