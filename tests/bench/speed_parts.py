"""The parts of the speed bench that compare ways of doing our own work; each optimisation alone, and all together."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import Tensor

from personalize.lean import halves_alike, in_precision, lean
from personalize.lora import _pair, add_lora, lora_layers, module_names, remove_lora
from personalize.lora_layers import several
from personalize.model import Conditioning, StableDiffusion
from personalize.moves import moves
from personalize.objectives import SingleImage
from personalize.sampling import Edit, denoise, initial_latents
from personalize.several import SeveralImages
from personalize.training import adam
from tests.bench.arms import Arm, measure
from tests.bench.speed_setup import base, channels_last, latents, not_lean, pefts_layers, run_of, stepper

if TYPE_CHECKING:
    from tests.bench.speed import SpeedBench

Rows = list[dict[str, Any]]


def entered(*contexts: Callable[[], Any]) -> Callable[[], Any]:
    """One context of several."""

    @contextmanager
    def together():
        with ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context())
            yield

    return together


def model_of(bench: SpeedBench) -> StableDiffusion:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return base(bench.base, torch.bfloat16 if bench.mixed_precision == "bf16" else torch.float32, device)


def timed(bench: SpeedBench, part: str, arms: list[Arm], **more: Any) -> Rows:
    device = model_of(bench).device
    more = {"groups": bench.groups, "calls": bench.calls, "clock": bench.clock, "device": device} | more
    return [row | {"batch": bench.batch, "rank": bench.rank} for row in measure(part, arms, **more)]


def lora(bench: SpeedBench) -> Rows:
    """An update with peft's LoRA layers, and with ours."""
    model = model_of(bench)
    with run_of(model, bench.batch, bench.rank, bench.latent) as run:
        step = stepper(run)
        return timed(bench, "lora layer", [Arm("peft's layers", step, pefts_layers), Arm("our layers", step)])


def passes(bench: SpeedBench) -> Rows:
    """An update with diffusers' UNet as it is, and lean."""
    model = model_of(bench)
    with run_of(model, bench.batch, bench.rank, bench.latent) as run:
        step = stepper(run)
        arms = [Arm("as it is", step, lambda: not_lean(model.unet)), Arm("lean", step)]
        return timed(bench, "lean update", arms)


def layout(bench: SpeedBench) -> Rows:
    """An update in either memory layout."""
    model = model_of(bench)
    with run_of(model, bench.batch, bench.rank, bench.latent) as run:
        step = stepper(run)
        arms = [Arm("NCHW", step), Arm("channels last", step, lambda: channels_last(model.unet))]
        return timed(bench, "layout of an update", arms)


def precision(bench: SpeedBench) -> Rows:
    """An update in fp32, in bf16 by autocast over an fp32 base, and on a bf16 base with an fp32 adapter."""
    model = base(bench.base)

    with run_of(model, bench.batch, bench.rank, bench.latent) as run:
        step = stepper(run)
        kind = model.device.type

        def autocast() -> Any:
            return torch.autocast(kind, torch.bfloat16)

        arms = [
            Arm("fp32", step),
            Arm("autocast, fp32 base, peft's layers", step, entered(autocast, pefts_layers)),
            Arm("autocast, fp32 base", step, autocast),
            Arm("bf16 base, fp32 adapter", step, lambda: _frozen_in(model, torch.bfloat16)),
        ]
        return timed(bench, "precision of an update", arms)


@contextmanager
def _frozen_in(model: StableDiffusion, dtype: torch.dtype):
    """As `in_precision`, with the adapter left as it is."""
    before = [(p, p.data) for name, p in model.unet.named_parameters() if ".lora_" not in name]
    for parameter, values in before:
        parameter.data = values.to(dtype)
    try:
        yield
    finally:
        for parameter, values in before:
            parameter.data = values


def optimizer(bench: SpeedBench) -> Rows:
    """AdamW's step alone, over all tensors of the adapter."""
    model = model_of(bench)
    with run_of(model, 1, bench.rank, bench.latent) as run:
        parameters = run.objective.adapter_parameters()
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        steps = {name: torch.optim.AdamW(parameters, 1e-9, **how).step for name, how in _ADAMS.items()}
        return timed(bench, "AdamW", [Arm(name, step) for name, step in steps.items()])


_ADAMS: dict[str, dict[str, Any]] = {"default": {}, "foreach": {"foreach": True}, "fused": {"fused": True}}


def together(bench: SpeedBench) -> Rows:
    """An update of the UNet as the reference script makes it, and ours: same modules, batch, resolution, precision.

    Theirs: train mode, peft's layers, default AdamW, and in bf16 autocast over a base in bf16.
    """
    model = model_of(bench)
    low = bench.mixed_precision == "bf16"
    kind = model.device.type
    accelerator = Accelerator(cpu=kind == "cpu", mixed_precision=bench.mixed_precision)
    with run_of(model, bench.batch, bench.rank, bench.latent, accelerator=accelerator) as run:
        theirs = stepper(run, torch.optim.AdamW(run.optimizer.param_groups))

        @contextmanager
        def training():
            model.unet.train()
            try:
                with torch.autocast(kind, torch.bfloat16) if low else nullcontext():
                    yield
            finally:
                model.unet.eval()

        arms = [
            Arm("as the reference makes it", theirs, entered(pefts_layers, lambda: not_lean(model.unet), training)),
            Arm("ours", stepper(run)),
        ]
        return timed(bench, "UNet step", arms)


def batches(bench: SpeedBench) -> Rows:
    """An update of 1, 2, 4 and 10 samples: milliseconds are per sample."""
    model, rows = model_of(bench), []
    for batch in (1, 2, 4, 10):
        with run_of(model, batch, bench.rank, bench.latent) as run:
            arms = [Arm(f"{batch} samples", stepper(run))]
            rows += timed(bench, "batch", arms, per=batch)
    first = rows[0]["ms_median"]
    return [row | {"ratio": first / row["ms_median"], "ratio_to": "1 sample", "ratio_ci95": [0, 0]} for row in rows]


def call(bench: SpeedBench) -> Rows:
    """One call of the UNet for one guided picture: two calls, one batch of two, each short cut alone and together."""
    model = model_of(bench)
    unet, z = model.unet, latents(model, 1, bench.latent)
    told = told_of(model)
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
        Arm("lean", one_batch, lambda: lean(unet)),
        Arm("shared beginning", one_batch, lambda: halves_alike(unet)),
        Arm("keys and values of the text kept", one_batch, lambda: kept_text(unet)),
        Arm("channels last", one_batch, lambda: channels_last(unet)),
        Arm("lean, shared beginning", one_batch, entered(lambda: lean(unet), lambda: halves_alike(unet))),
        Arm("the same in bf16", one_batch, entered(lambda: in_precision(unet, torch.bfloat16), lambda: lean(unet),
                                                   lambda: halves_alike(unet))),
    ]  # fmt: skip
    return timed(bench, "guided call", arms)


def told_of(model: StableDiffusion) -> Conditioning:
    with torch.no_grad():
        return model.prompts(["", "a photo of a cat"])


@contextmanager
def kept_text(unet: Any):
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
    edit = Edit(told_of(model)[1:])
    plan = moves(model, 30)
    start = initial_latents(model, [0], None)

    def draw() -> None:
        model.decode(denoise(model, start, edit, plan))

    def stock() -> Any:
        from unittest.mock import patch

        return patch.multiple("personalize.sampling", lean=lambda unet: nullcontext(),
                              halves_alike=lambda unet, wanted: nullcontext())  # fmt: skip

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
        told = told_of(model)[1:]
        start = latents(model, count, bench.latent)
        plan = moves(model, steps)

        def single() -> None:
            for row in range(count):
                denoise(model, start[row : row + 1], Edit(told), plan)

        def whole() -> None:
            denoise(model, start, Edit(told), plan)

        arms = [Arm("one at a time", single), Arm("one batch of 8", whole)]
        return timed(bench, "grid of edits", arms, per=count * steps)
    finally:
        remove_lora(model.unet)


def adapters(bench: SpeedBench) -> Rows:
    """An update of 1, 2 and 4 adapters in one batch; milliseconds are per adapter."""
    model, rows = model_of(bench), []
    with run_of(model, bench.batch, bench.rank, bench.latent) as run:
        layers = lora_layers(model.unet)
        for count in (1, 2, 4):
            pairs = [[torch.nn.Parameter(p.detach().expand(count, *p.shape).clone()) for p in _pair(layer)]
                     for layer in layers.values()]  # fmt: skip
            stacked = dict(zip(layers, map(tuple, pairs), strict=True))
            told = Conditioning.cat([run.objective.source()] * count)
            objective = SeveralImages(SingleImage(model, told), stacked)  # pyright: ignore
            optimizer = adam([{"params": list(objective.parameters()), "lr": 1e-6}], model.device)
            batch = next(run.picture.batches(run.share, 0, 1))
            many = {key: torch.cat([value] * count) for key, value in batch.items()}
            many["rows"] = torch.arange(count).repeat_interleave(bench.batch)
            step = _update(objective, optimizer, {key: value.to(model.device) for key, value in many.items()})
            with several(layers, stacked):
                arms = [Arm(f"{count} in one batch", step)]
                rows += timed(bench, "adapters", arms, per=count)
    first = rows[0]["ms_median"]
    return [row | {"ratio": first / row["ms_median"], "ratio_to": "1 in one batch"} for row in rows]


def _update(objective: Any, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor]) -> Callable[[], None]:
    def step() -> None:
        objective(batch).total.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _reference(bench: SpeedBench) -> Rows:
    from tests.bench.speed_reference import reference

    return reference(bench)


def _growth(bench: SpeedBench) -> Rows:
    from tests.bench.speed_growth import growth

    return growth(bench)


DEFAULT: dict[str, Callable[[SpeedBench], Rows]] = {
    "lora": lora, "passes": passes, "layout": layout, "precision": precision, "optimizer": optimizer,
    "together": together, "batches": batches, "call": call, "pictures": pictures, "grid": grid, "adapters": adapters,
}  # fmt: skip
PARTS = DEFAULT | {"reference": _reference, "growth": _growth}
