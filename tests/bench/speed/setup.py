"""What the parts of the speed bench share: a training step, its inputs, and the contexts that differ between arms."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft.tuners.lora import Conv2d, Linear
from torch import Tensor

from personalize.adapters import lora_layers
from personalize.cli.pages import keep_freed_memory
from personalize.embedded import samples
from personalize.models.fast_paths import fast_paths
from personalize.models.stable_diffusion import StableDiffusion
from personalize.randomness import generator
from personalize.training.config import SingleImageConfig
from personalize.training.single_image import SingleImageRun, single_image_run
from tests.bench.speed.arms import Arm, measure
from tests.bench.speed.bases import base

if TYPE_CHECKING:
    from tests.bench.speed.bench import SpeedBench

Rows = list[dict[str, Any]]
_FAST_PATHS = fast_paths.__module__
_RETURNED = {-4: 2**16, -3: 2**25, -1: 2**26, -2: 2**17}  # mallopt(3): what glibc's own thresholds end with
_kept = [False]


@contextmanager
def freed_memory(kept: bool) -> Iterator[None]:
    """Run the body with freed memory kept, as by `personalize train`, or returned to the system, as by default."""
    _kept.append(kept)
    _set_memory(kept)
    try:
        yield
    finally:
        _kept.pop()
        _set_memory(_kept[-1])


def _set_memory(kept: bool) -> None:
    if kept:
        keep_freed_memory()
    elif (mallopt := getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None) is not None:
        for option, value in _RETURNED.items():
            mallopt(option, value)


def combined(*contexts: Callable[[], Any]) -> Callable[[], Any]:
    """A function that opens several contexts as one."""

    @contextmanager
    def together():
        with ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context())
            yield

    return together


def model_of(bench: SpeedBench) -> StableDiffusion:
    """The bench's base in its precision, on the GPU if there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return base(bench.base, torch.bfloat16 if bench.mixed_precision == "bf16" else torch.float32, device)


def timed(bench: SpeedBench, part: str, arms: list[Arm], **more: Any) -> Rows:
    """`measure` with the bench's options, over which those in `more` take precedence."""
    device = model_of(bench).device
    more = {
        "groups": bench.groups,
        "calls": bench.calls,
        "clock": bench.clock,
        "device": device,
        "seconds": bench.seconds,
    } | more
    return [row | {"batch": bench.batch, "rank": bench.rank} for row in measure(part, arms, **more)]


def picture(side: int) -> Tensor:
    """A sample picture as pixels (1, 3, side, side) in [−1, 1]."""
    image = samples.bundled(0).picture.convert("RGB").resize((side, side))
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(1, side, side, 3).permute(
        0, 3, 1, 2
    ).float() / 127.5 - 1  # fmt: skip


def latents(model: StableDiffusion, rows: int, side: int | None) -> Tensor:
    """Standard normal latents (rows, 4, side, side); side: the base's own for None."""
    side = side or int(model.unet.config.sample_size)
    return torch.randn(rows, 4, side, side, generator=generator(0, "bench")).to(model.device)


@contextmanager
def run_of(
    model: StableDiffusion, batch: int, rank: int, side: int | None, *, keep: bool = True
) -> Iterator[SingleImageRun]:
    """A training run on a sample picture with `batch` samples an update; keep: keep freed memory meanwhile."""
    config = SingleImageConfig(
        rank=rank, samples_per_update=batch, train_batch_size=batch, max_train_samples=batch * 10_000
    )
    pixels = picture((side or model.unet.config.sample_size) * model.factor)
    with (
        freed_memory(keep),
        single_image_run(model, pixels, "a photo of a cat", config, accelerator=accelerated(model)) as run,
    ):
        yield run


def accelerated(model: StableDiffusion) -> Accelerator:
    """An Accelerator in the base's precision; the state that Accelerate keeps for the process is reset first."""
    AcceleratorState._reset_state(reset_partial_state=True)
    low = model.dtype == torch.bfloat16
    return Accelerator(cpu=model.device.type == "cpu", mixed_precision="bf16" if low else "no")


def stepper(run: SingleImageRun, optimizer: torch.optim.Optimizer | None = None) -> Callable[[], None]:
    """A function that makes one update of `run`, without the training loop's checks and reports."""
    batch = next(run.dataset.batches(run.shard, 0, 1))
    batch = {key: value.to(run.model.device) for key, value in batch.items()}
    chosen = optimizer or run.optimizer

    def step() -> None:
        run._prepared(batch).total.backward()
        chosen.step()
        chosen.zero_grad(set_to_none=True)

    return step


@contextmanager
def pefts_layers() -> Iterator[None]:
    """Run the body with the forward functions of peft's own LoRA layers."""
    ours = lora_layers.LoraLinear.forward, lora_layers.LoraConv2d.forward
    lora_layers.LoraLinear.forward, lora_layers.LoraConv2d.forward = Linear.forward, Conv2d.forward  # pyright: ignore
    try:
        yield
    finally:
        lora_layers.LoraLinear.forward, lora_layers.LoraConv2d.forward = ours


@contextmanager
def plain_unet(unet: Any) -> Iterator[None]:
    """Run the body with `fast_paths` switched off: the attributes that it has set are removed meanwhile."""
    names = ("output_scale_factor", "rescale_output_factor", "forward")
    taken = []
    for module in unet.modules():
        for name in names:
            value = vars(module).get(name)
            if _FAST_PATHS in (type(value).__module__, getattr(getattr(value, "func", None), "__module__", "")):
                taken.append((vars(module), name, vars(module).pop(name)))
                if name.endswith("factor"):
                    vars(module)[name] = 1.0
    try:
        yield
    finally:
        for own, name, value in taken:
            own[name] = value


@contextmanager
def channels_last(unet: Any) -> Iterator[None]:
    """Run the body with the weights in channels-last memory format."""
    unet.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    try:
        yield
    finally:
        unet.to(memory_format=torch.contiguous_format)
