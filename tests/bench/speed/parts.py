"""The parts of the speed bench about training: each optimisation of an update alone, and all together."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from personalize.adapters.lora import _pair, lora_layers
from personalize.adapters.lora_layers import batched_adapters
from personalize.models.stable_diffusion import Conditioning, StableDiffusion
from personalize.training.batched_adapters import BatchedAdapters
from personalize.training.loop import adamw
from tests.bench.speed.arms import Arm
from tests.bench.speed.bases import base
from tests.bench.speed.device import ceiling, graph, memory
from tests.bench.speed.drawing import call, grid, pictures
from tests.bench.speed.growth import growth
from tests.bench.speed.jobs import jobs
from tests.bench.speed.pages import kept
from tests.bench.speed.reference import reference
from tests.bench.speed.setup import (
    Rows,
    channels_last,
    combined,
    freed_memory,
    model_of,
    pefts_layers,
    plain_unet,
    run_of,
    stepper,
    timed,
)

if TYPE_CHECKING:
    from tests.bench.speed.bench import SpeedBench


def lora(bench: SpeedBench) -> Rows:
    """An update with peft's LoRA layers, and with ours."""
    model = model_of(bench)
    with run_of(model, bench.batch, bench.rank, bench.latent) as run:
        step = stepper(run)
        arms = [
            Arm("peft's layers", step, pefts_layers),
            Arm("our layers", step),
        ]
        return timed(bench, "lora layer", arms)


def passes(bench: SpeedBench) -> Rows:
    """An update with diffusers' UNet as it is, and with `fast_paths`."""
    model = model_of(bench)
    with run_of(model, bench.batch, bench.rank, bench.latent) as run:
        step = stepper(run)
        arms = [
            Arm("as it is", step, lambda: plain_unet(model.unet)),
            Arm("fast paths", step),
        ]
        return timed(bench, "fast paths of an update", arms)


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
            Arm("autocast, fp32 base, peft's layers", step, combined(autocast, pefts_layers)),
            Arm("autocast, fp32 base", step, autocast),
            Arm("bf16 base, fp32 adapter", step, lambda: _frozen_in(model, torch.bfloat16)),
        ]
        return timed(bench, "precision of an update", arms)


@contextmanager
def _frozen_in(model: StableDiffusion, dtype: torch.dtype):
    """Run the body with the base's weights in `dtype` and the adapter's unchanged."""
    before = [(p, p.data) for name, p in model.unet.named_parameters() if ".lora_" not in name]
    for parameter, values in before:
        parameter.data = values.to(dtype)
    try:
        yield
    finally:
        for parameter, values in before:
            parameter.data = values


def optimizer(bench: SpeedBench) -> Rows:
    """AdamW's step alone, over all parameters of the adapter."""
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

    Theirs: train mode, peft's layers, default AdamW, freed memory given back, and in bf16 autocast over a base in bf16.
    """
    model = model_of(bench)
    low = bench.mixed_precision == "bf16"
    kind = model.device.type
    with run_of(model, bench.batch, bench.rank, bench.latent) as run:
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
            Arm("as the reference makes it", theirs, combined(
                pefts_layers, lambda: plain_unet(model.unet), lambda: freed_memory(False), training,
            )),
            Arm("ours", stepper(run)),
        ]  # fmt: skip
        return timed(bench, "UNet step", arms)


def batches(bench: SpeedBench) -> Rows:
    """An update of 1, 2, 4 and 10 samples; milliseconds are per sample."""
    model, rows = model_of(bench), []
    for batch in (1, 2, 4, 10):
        with run_of(model, batch, bench.rank, bench.latent) as run:
            arms = [Arm(f"{batch} samples", stepper(run))]
            rows += timed(bench, "batch", arms, per=batch)
    first = rows[0]["ms_median"]
    return [row | {"ratio": first / row["ms_median"], "ratio_to": "1 sample", "ratio_ci95": [0, 0]} for row in rows]


def adapters(bench: SpeedBench) -> Rows:
    """An update of 1, 2 and 4 adapters in one batch; milliseconds are per adapter."""
    model, rows = model_of(bench), []
    with run_of(model, bench.batch, bench.rank, bench.latent) as run:
        layers = lora_layers(model.unet)
        for count in (1, 2, 4):
            pairs = [[torch.nn.Parameter(p.detach().expand(count, *p.shape).clone()) for p in _pair(layer)]
                     for layer in layers.values()]  # fmt: skip
            stacked = dict(zip(layers, map(tuple, pairs), strict=True))
            conditioning = Conditioning.cat([run.objective.source()] * count)
            objective = BatchedAdapters(model, conditioning, stacked)  # pyright: ignore
            optimizer = adamw([{"params": list(objective.parameters()), "lr": 1e-6}], model.device)
            batch = next(run.dataset.batches(run.shard, 0, 1))
            many = {key: torch.cat([value] * count) for key, value in batch.items()}
            many["rows"] = torch.arange(count).repeat_interleave(bench.batch)
            step = _update(objective, optimizer, {key: value.to(model.device) for key, value in many.items()})
            with batched_adapters(layers, stacked):  # pyright: ignore
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


DEFAULT: dict[str, Callable[[SpeedBench], Rows]] = {
    "lora": lora, "passes": passes, "layout": layout, "precision": precision, "optimizer": optimizer,
    "together": together, "batches": batches, "call": call, "pictures": pictures, "grid": grid, "adapters": adapters,
}  # fmt: skip
PARTS = DEFAULT | {
    "ceiling": ceiling, "graph": graph, "memory": memory, "reference": reference, "growth": growth, "jobs": jobs,
    "pages": kept,
}  # fmt: skip
