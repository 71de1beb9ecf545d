"""How much memory a run will take, measured on one sample before it starts.

    peak ≈ base + P · (4 + 4 + s) + b · a

base: bytes of UNet, autoencoder and text encoders as they were loaded, the adapter left out.
P: entries that learn, fp32: 4 bytes of weight, 4 of gradient, s = 8 of AdamW's two moments (8-bit: 2, and 8 bytes of
    scales to every 256 entries, but still 8 for tensors of fewer than 4,096).
a: the most bytes alive at once, of those that the forward and backward pass of one sample allocate; b samples a batch.

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

from personalize.data import SampleShard
from personalize.errors import UserError
from personalize.quantisation import held

if TYPE_CHECKING:
    from personalize.learning import SingleImageRun

SMALL_TENSOR, BLOCK = 4096, 256  # of bitsandbytes' 8-bit optimisers


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes, on the device that trains; `sample` is one sample's share of the activations."""

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
            f"Memory, about {_size(self.total)}: base {_size(self.base)}, adapter with gradients "
            f"{_size(self.adapter + self.gradients)}, optimiser {_size(self.optimizer)}, "
            f"activations of {self.batch} sample{'s' * (self.batch > 1)} {_size(self.activations)}"
        )


def estimate(run: SingleImageRun) -> MemoryEstimate:
    """What `run` will take; one sample is tried for it, which changes nothing.

    Raises:
        UserError: not even one sample fits.
    """
    learns = list(run.objective.trainable().values())
    sizes = [parameter.numel() for parameter in learns]
    adapter = 4 * sum(sizes)
    parts = (run.model.unet, run.model.vae, *run.model.text_encoders)
    moments = [_eight_bit(size) if run.recipe.use_8bit_adam else 8 * size for size in sizes]
    base = sum(map(held, parts)) - sum(4 * p.numel() for part in parts for p in part.parameters() if p.requires_grad)
    return MemoryEstimate(base, adapter, adapter, sum(moments), _tried(run, learns), run.recipe.train_batch_size)


def check_fits(expected: MemoryEstimate, run: SingleImageRun) -> str | None:
    """A sentence of advice if `expected` is more than is free now besides the base; None if it fits."""
    free = _free(run.model.device)
    wanted = expected.total - expected.base - expected.adapter  # these two are there already
    if free is None or wanted <= free:
        return None
    return f"only {_size(free)} of memory are free, and about {_size(wanted)} more will be needed: {_cheaper(run)}"


def _free(device: torch.device) -> int | None:
    """Bytes that a run could still take; None where nobody tells."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    told = Path("/proc/meminfo")  # Linux
    if device.type != "cpu" or not told.is_file():
        return None
    found = re.search(r"MemAvailable:\s+(\d+) kB", told.read_text())
    return int(found[1]) * 1024 if found else None


def _cheaper(run: SingleImageRun) -> str:
    recipe, small = run.recipe, "quantisation" in run.base
    steps = [
        (recipe.train_batch_size > 1, "--train_batch_size 1 and more --gradient_accumulation_steps"),
        (not recipe.gradient_checkpointing, "--gradient_checkpointing"),
        (not small, "--load_in_4bit"),
        (True, "a lower --resolution"),
    ]
    return f"use {next(text for possible, text in steps if possible)}"


def _eight_bit(size: int) -> int:
    return 8 * size if size < SMALL_TENSOR else 2 * size + 8 * -(-size // BLOCK)


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def _tried(run: SingleImageRun, learns: list[nn.Parameter]) -> int:
    """The peak of live bytes over one sample's forward and backward pass."""
    batch: Any = next(run.picture.batches(SampleShard(1), 0, 1))
    here = [*_tensors(run.objective), *_tensors(run.model.unet), *(t for t in batch.values() if isinstance(t, Tensor))]
    try:
        with LiveBytes(here) as live, run.accelerator.autocast():
            torch.autograd.grad(run.objective(batch).total, learns, allow_unused=True)
    except torch.OutOfMemoryError:
        raise UserError(f"not even one sample fits into memory: {_cheaper(run)}") from None
    return live.peak


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


class LiveBytes(TorchDispatchMode):
    """Inside it, `now` counts the bytes of all tensors made inside that are still alive; `peak` is its maximum."""

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
