"""Estimate how much memory a training run will take, from one sample measured before it starts.

    peak = max(updates, encoding, decoding)             updates = base + P · (4 + 4 + s) + b · a
    encoding = base + v + max(n, e)                     decoding = base + P · (4 + s) + max(n, v + d)

base: bytes of the UNet, and of those of autoencoder and text encoders that updates use, without the adapter.
v, n: bytes of autoencoder and text encoders if they are off the device during updates (`models.idle_parts`), else 0.
    Both are there when the base has been loaded; afterwards each comes back by itself, when it is used.
P: number of trained parameters, in fp32: 4 bytes of weight, 4 of gradient, and s = 8 of AdamW's two moments (8-bit: 2,
    and 8 bytes of scales for every 256 parameters, but still 8 in tensors of fewer than 4,096).
a: the peak of the bytes that the forward and backward pass of one sample allocate; b: samples in a batch.
e, d: the peak of the bytes that the autoencoder allocates for one picture to encode it, and to decode it for a preview.

Not counted: the device's own context and work spaces (about 1 GB on CUDA), fragmentation, other programs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from personalize.errors import UserError
from personalize.models.memory import LiveBytes, decoding_bytes, encoding_bytes, free_bytes
from personalize.models.quantization import weight_bytes
from personalize.models.vae import TILE
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
    idle_vae: int = 0
    idle_encoders: int = 0
    encoding_picture: int = 0
    decoding_picture: int = 0

    @property
    def idle(self) -> int:
        """The bytes of what is off the device during the updates."""
        return self.idle_vae + self.idle_encoders

    @property
    def activations(self) -> int:
        return self.batch * self.sample

    @property
    def updates(self) -> int:
        return self.base + self.adapter + self.gradients + self.optimizer + self.activations

    @property
    def encoding(self) -> int:
        return self.base + self.idle_vae + max(self.idle_encoders, self.encoding_picture)

    @property
    def decoding(self) -> int:
        used = max(self.idle_encoders, self.idle_vae + self.decoding_picture)
        return self.base + self.adapter + self.optimizer + used

    @property
    def total(self) -> int:
        return max(self.updates, self.encoding, self.decoding)

    def __str__(self) -> str:
        phases = {"the updates": self.updates, "encoding": self.encoding, "previews": self.decoding}
        return (
            f"Memory, about {_readable(self.total)}: base {_readable(self.base)}, adapter with gradients "
            f"{_readable(self.adapter + self.gradients)}, optimizer {_readable(self.optimizer)}, "
            f"activations of {self.batch} sample{'s' * (self.batch > 1)} {_readable(self.activations)}; "
            f"most in {max(phases, key=phases.__getitem__)}: "
            + ", ".join(f"{name} {_readable(count)}" for name, count in phases.items())
        )


def estimate(run: TrainingRun) -> MemoryEstimate:
    """The memory that `run` will take, measured by a forward and backward pass of one sample, which changes nothing.

    Raises:
        UserError: not even one sample fits.
    """
    trained = list(run.objective.trainable().values())
    sizes = [parameter.numel() for parameter in trained]
    adapter = 4 * sum(sizes)
    model, size = run.model, run.size
    idle_vae, idle_encoders = (
        sum(weight_bytes(part) for part in some if part in model.offload) for some in ([model.vae], model.text_encoders)
    )
    parts = [part for part in (model.unet, model.vae, *model.text_encoders) if part not in model.offload]
    moments = [_eight_bit(size) if run.config.use_8bit_adam else 8 * size for size in sizes]
    trained_in_base = sum(4 * p.numel() for part in parts for p in part.parameters() if p.requires_grad)
    base = sum(map(weight_bytes, parts)) - trained_in_base
    sample = _measure_sample(run, trained)
    decoded = (min(size[0], TILE), min(size[1], TILE)) if model.offload.tiled else size
    return MemoryEstimate(
        base, adapter, adapter, sum(moments), sample, run.shard.largest,
        idle_vae, idle_encoders, encoding_bytes(model.vae, size), decoding_bytes(model.vae, decoded),
    )  # fmt: skip


def check_fits(expected: MemoryEstimate, run: TrainingRun) -> str | None:
    """A sentence of advice if `expected` exceeds the free memory; None if it fits."""
    free = free_bytes(run.model.device)
    most = max(expected.updates, expected.decoding)  # encoding is over
    wanted = most - expected.base - expected.adapter  # these two are allocated already
    if free is None or wanted <= free:
        return None
    advice = _advice(run, previews=most > expected.updates)
    return f"only {_readable(free)} of memory are free, about {_readable(wanted)} more will be needed: {advice}"


def _advice(run: TrainingRun, *, previews: bool = False) -> str:
    """What takes less memory; `previews`: they take the most, not the updates."""
    config, quantised = run.config, "quantisation" in run.base
    options = [
        (previews and not run.model.offload.tiled, "--offload"),
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
