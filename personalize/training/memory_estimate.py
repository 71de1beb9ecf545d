"""Estimate how much memory a training run will take, from one sample measured before it starts.

    peak ≈ base + P · (4 + 4 + s) + b · a

base: bytes of UNet, autoencoder and text encoders, without the adapter.
P: number of trained parameters, in fp32: 4 bytes of weight, 4 of gradient, and s = 8 of AdamW's two moments (8-bit: 2,
    and 8 bytes of scales for every 256 parameters, but still 8 in tensors of fewer than 4,096).
a: the peak of the bytes that the forward and backward pass of one sample allocate; b: samples in a batch.

Not counted: the device's own context and work spaces (about 1 GB on CUDA), fragmentation, other programs.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from personalize.errors import UserError
from personalize.models.quantization import weight_bytes
from personalize.training.data.samples import SampleShard

if TYPE_CHECKING:
    from personalize.training.run import TrainingRun

SMALL_TENSOR, BLOCK = 4096, 256  # parameters: see bitsandbytes' 8-bit optimizers in the docstring


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on the training device; `sample` is the activations of one sample, `batch` the samples in a batch."""

    base: int
    adapter: int
    gradients: int
    optimizer: int
    sample: int
    batch: int

    @property
    def activations(self) -> int:
        return self.batch * self.sample

    @property
    def total(self) -> int:
        return self.base + self.adapter + self.gradients + self.optimizer + self.activations

    def __str__(self) -> str:
        return (
            f"Memory, about {_readable(self.total)}: base {_readable(self.base)}, adapter with gradients "
            f"{_readable(self.adapter + self.gradients)}, optimizer {_readable(self.optimizer)}, "
            f"activations of {self.batch} sample{'s' * (self.batch > 1)} {_readable(self.activations)}"
        )


def estimate(run: TrainingRun) -> MemoryEstimate:
    """The memory that `run` will take, measured by a forward and backward pass of one sample, which changes nothing.

    Raises:
        UserError: not even one sample fits.
    """
    trained = list(run.objective.trainable().values())
    sizes = [parameter.numel() for parameter in trained]
    adapter = 4 * sum(sizes)
    parts = (run.model.unet, run.model.vae, *run.model.text_encoders)
    moments = [_eight_bit(size) if run.config.use_8bit_adam else 8 * size for size in sizes]
    trained_in_base = sum(4 * p.numel() for part in parts for p in part.parameters() if p.requires_grad)
    base = sum(map(weight_bytes, parts)) - trained_in_base
    sample = _measure_sample(run, trained)
    return MemoryEstimate(base, adapter, adapter, sum(moments), sample, run.shard.largest)


def check_fits(expected: MemoryEstimate, run: TrainingRun) -> str | None:
    """A sentence of advice if `expected` exceeds the free memory; None if it fits."""
    free = _free(run.model.device)
    wanted = expected.total - expected.base - expected.adapter  # these two are allocated already
    if free is None or wanted <= free:
        return None
    return f"only {_readable(free)} of memory are free, about {_readable(wanted)} more will be needed: {_advice(run)}"


def _free(device: torch.device) -> int | None:
    """Free bytes on `device`; None where this cannot be found out."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")  # Linux
    if device.type != "cpu" or not meminfo.is_file():
        return None
    match = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())
    return int(match[1]) * 1024 if match else None


def _advice(run: TrainingRun) -> str:
    config, quantised = run.config, "quantisation" in run.base
    options = [
        (run.shard.largest > 1, "--train_batch_size 1"),
        (not config.gradient_checkpointing, "--gradient_checkpointing"),
        (not quantised, "--load_in_4bit"),
        (True, "a lower --resolution"),
    ]
    return f"use {next(text for possible, text in options if possible)}"


def _eight_bit(size: int) -> int:
    """Bytes of both moments of a tensor of `size` parameters in 8-bit AdamW."""
    return 8 * size if size < SMALL_TENSOR else 2 * size + 8 * -(-size // BLOCK)


def _readable(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def _measure_sample(run: TrainingRun, trained: list[nn.Parameter]) -> int:
    """The peak of the bytes allocated by one sample's forward and backward pass."""
    batch: Any = next(run.dataset.updates(SampleShard(1), 0, 1))[0]
    inputs = (value for value in batch.values() if isinstance(value, Tensor))
    existing = [*_tensors(run.objective), *_tensors(run.model.unet), *inputs]
    try:
        with LiveBytes(existing) as live, run.accelerator.autocast():
            torch.autograd.grad(run.objective(batch).total, trained, allow_unused=True)
    except torch.OutOfMemoryError:
        raise UserError(f"not even one sample fits into memory: {_advice(run)}") from None
    return live.peak


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors created while it is active and still alive: `now`, and the maximum, `peak`."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size
