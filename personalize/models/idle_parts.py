"""Parts of a base model that are off its device while nothing uses them: text encoders and autoencoder while training.

Weights leave a GPU for the CPU's memory.  Those of a model on the CPU go to a temporary file without a name, which is
mapped into memory: what is read of it comes back page by page, and is dropped again after use.
"""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from personalize.models.memory import return_free_blocks
from personalize.models.offloading import offloaded

ALIGNMENT = 64  # bytes; where a tensor begins in the file


class Offload:
    """The parts of one model that are off its device while nothing uses them.

    tiled: decode pictures in tiles.
    """

    def __init__(self) -> None:
        self._parts: dict[int, OffloadedPart] = {}  # by the part's id
        self.tiled = False

    def __contains__(self, part: Any) -> bool:
        return id(part) in self._parts

    @contextmanager
    def idle(self, parts: Sequence[Any], *, sparing: bool = False) -> Iterator[None]:
        """Run the body while `parts`, of VAE and text encoders, are off the device except while the model uses them.

        With `sparing` on a CPU too, and pictures are decoded in tiles.  Contexts may be nested; afterwards the weights
        are back, with the values they had.
        """
        before = self.tiled
        devices = {id(part): next(part.parameters()).device for part in parts}
        wanted = [
            part for part in parts
            if part not in self and not offloaded(part) and (sparing or devices[id(part)].type != "cpu")
        ]  # fmt: skip
        self.tiled = self.tiled or sparing
        try:
            for part in wanted:
                self._parts[id(part)] = OffloadedPart(part, devices[id(part)])
            yield
        finally:
            self.tiled = before
            for part in wanted:
                if (off := self._parts.pop(id(part), None)) is not None:
                    off.end()

    @contextmanager
    def using(self, *parts: Any) -> Iterator[None]:
        """Run the body with `parts` on the device, wherever they are otherwise."""
        with ExitStack() as stack:
            for part in parts:
                if (off := self._parts.get(id(part))) is not None:
                    stack.enter_context(off.awake())
            yield


class OffloadedPart:
    """A module whose weights are off `device`, except inside `awake`, until `end`."""

    def __init__(self, part: nn.Module, device: torch.device) -> None:
        self.device, self.users = device, 0
        self.weights = [*part.parameters()]
        self.file: mmap.mmap | None = None
        if device.type == "cpu":
            self.file, self.kept = _mapped([weight.data for weight in self.weights])
        else:
            self.kept = [weight.data.cpu() for weight in self.weights]
        self._leave()

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Run the body with the weights on the device; contexts may be nested."""
        if not self.users:
            self._come()
        self.users += 1
        try:
            yield
        finally:
            self.users -= 1
            if not self.users:
                self._leave()

    def end(self) -> None:
        """Bring the weights back for good, with the values they had."""
        for weight, kept in zip(self.weights, self.kept, strict=True):
            weight.data = kept.to(self.device, copy=True)

    def _come(self) -> None:
        for weight, kept in zip(self.weights, self.kept, strict=True):
            weight.data = kept.to(self.device)

    def _leave(self) -> None:
        for weight, kept in zip(self.weights, self.kept, strict=True):
            weight.data = kept
        if self.file is not None and hasattr(mmap, "MADV_DONTNEED"):
            self.file.madvise(mmap.MADV_DONTNEED)
            return_free_blocks()  # the weights', and those of what was computed with them


def _mapped(tensors: list[Tensor]) -> tuple[mmap.mmap, list[Tensor]]:
    """Copies of CPU `tensors` in a temporary file, mapped into memory privately."""
    starts = []
    with tempfile.TemporaryFile() as file:
        for tensor in tensors:
            file.seek(-file.tell() % ALIGNMENT, 1)
            starts.append(file.tell())
            file.write(_bytes(tensor))
        file.write(bytes(1))  # a file of no bytes cannot be mapped
        file.flush()
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    copies = [
        torch.frombuffer(mapped, dtype=tensor.dtype, count=tensor.numel(), offset=start).view(tensor.shape)
        if tensor.numel() else tensor
        for tensor, start in zip(tensors, starts, strict=True)
    ]  # fmt: skip
    return mapped, copies


def _bytes(tensor: Tensor) -> Any:
    data: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(data)
