"""The parts of the speed bench about the machine: the speed of basic operations, CUDA graphs, and peaks of memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import conv2d, scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

from personalize.models.cuda_graphs import recorded
from personalize.training.config import SingleImageConfig
from personalize.training.cuda_graph import GraphedStep
from personalize.training.memory_estimate import estimate
from personalize.training.single_image import SingleImageRun, single_image_run
from tests.bench.speed.arms import Arm, facts, measure
from tests.bench.speed.bases import base
from tests.bench.speed.setup import Rows, accelerated, model_of, picture, run_of, stepper, timed

if TYPE_CHECKING:
    from tests.bench.speed.bench import SpeedBench

WIDTHS = (40, 64, 80, 160)  # of attention heads


def ceiling(bench: SpeedBench) -> Rows:
    """The speed of basic operations: products, convolutions, copies, attention by width; in TFLOP/s or TB/s."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    side = 8192 if device.type == "cuda" else 1024
    low = torch.bfloat16 if device.type == "cuda" or bench.mixed_precision == "bf16" else torch.float32

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=low)

    a, b = drawn(side, side), drawn(side, side)
    x, w = drawn(10, 320, 64, 64), drawn(320, 320, 3, 3)
    last = {"memory_format": torch.channels_last}
    y, v = x.contiguous(**last), w.contiguous(**last)  # pyright: ignore
    work: dict[str, tuple[Callable[[], Any], float]] = {
        f"product {side}": (lambda: a @ b, 2.0 * side**3),
        "convolution 320, 64x64, NCHW": (lambda: conv2d(x, w, padding=1), 2.0 * 10 * 4096 * 320 * 320 * 9),
        "convolution 320, 64x64, NHWC": (lambda: conv2d(y, v, padding=1), 2.0 * 10 * 4096 * 320 * 320 * 9),
        "copy": (a.clone, 2.0 * a.numel() * a.element_size()),
    }
    for width in WIDTHS:
        work |= _attention(drawn(4, 8, 4096, width), width)
    arms = [Arm(name, run, facts={"work": size}) for name, (run, size) in work.items()]
    how: dict[str, Any] = {"groups": bench.groups, "calls": 1, "clock": bench.clock, "seconds": bench.seconds}
    rows = measure("ceiling", arms, device=device, **how)
    return [row | {"tera_per_s": row["work"] / row["ms_median"] / 1e9} for row in rows]


def _attention(q: torch.Tensor, width: int) -> dict[str, tuple[Callable[[], Any], float]]:
    products = 4.0 * q.shape[0] * q.shape[1] * q.shape[2] ** 2 * width
    q.requires_grad_()

    def back() -> None:
        torch.autograd.grad(scaled_dot_product_attention(q, q, q).sum(), q)

    still = q.detach()
    return {
        f"attention {width}, forward": (lambda: scaled_dot_product_attention(still, still, still), products),
        f"attention {width}, both ways": (back, 3 * products),
    }


def graph(bench: SpeedBench) -> Rows:
    """An update of 1, 4 and 10 samples, eager and as a replayed CUDA graph."""
    model, rows = model_of(bench), []
    if model.device.type != "cuda":
        raise NotImplementedError("graphs need a CUDA device")
    for batch in (1, 4, 10):
        with run_of(model, batch, bench.rank, bench.latent) as run:
            for parameter in run.objective.trainable().values():
                parameter.grad = None
            few = run.dataset.batches(run.shard, 0, 400)
            step = GraphedStep(run.objective, few, run.optimizer.optimizer, model.device)
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                for _ in range(3):
                    step()
            replay = recorded(step, step.count.device)

            def again(run: Callable[[], None] = replay, step: GraphedStep = step) -> None:
                step.count.zero_()
                run()

            arms = [Arm(f"eager, {batch} samples", stepper(run)), Arm(f"graph, {batch} samples", again)]
            rows += timed(bench, "graph", arms)
    return rows


def memory(bench: SpeedBench) -> Rows:
    """The memory estimate that is printed before a run, against the peak of two updates.

    Measured in bf16 and NF4, with gradient checkpointing and without.  The peak is that of CUDA's allocator; on the
    CPU, that of the profiler's log of allocations, plus the base and the adapter.
    """
    rows = []
    for small in (False, True):
        base.cache_clear()
        model = base(bench.base, torch.bfloat16, "cuda" if torch.cuda.is_available() else "cpu")
        if small:
            model.quantize()
        for checkpointing in (False, True):
            config = SingleImageConfig(
                rank=bench.rank, samples_per_update=bench.batch, train_batch_size=bench.batch,
                max_train_samples=2 * bench.batch,
                gradient_checkpointing=checkpointing,
            )  # fmt: skip
            side = (bench.latent or model.unet.config.sample_size) * model.factor
            accelerator = accelerated(model)
            with single_image_run(model, picture(side), "a photo of a cat", config, accelerator=accelerator) as run:
                expected = estimate(run)
                peak = _peak(run, expected.base + expected.adapter)
            name = f"{'NF4' if small else 'bf16'}{', checkpointed' if checkpointing else ''}"
            sizes = {"gb_alloc": peak / 1e9, "gb_predicted": expected.updates / 1e9, "ratio": expected.updates / peak}
            none = {"ms_median": 0.0, "ms_p10": 0.0, "ms_p90": 0.0, "ratio_ci95": [0, 0], "ratio_to": "measured peak"}
            rows.append(facts(model.device) | {"part": "memory", "arm": name, **sizes, **none, "batch": bench.batch})
    base.cache_clear()
    return rows


def _peak(run: SingleImageRun, allocated: int) -> int:
    """Bytes at the peak of all updates; `allocated` are those of base and adapter, which the CPU's log lacks."""
    if run.model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        for _ in run.steps():
            pass
        return torch.cuda.max_memory_allocated()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as log:
        for _ in run.steps():
            pass
    events = [event for event in log.profiler.kineto_results.events() if event.name() == "[memory]"]  # pyright: ignore
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()  # pyright: ignore
        peak = max(peak, now)
    return allocated + peak
