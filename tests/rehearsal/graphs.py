"""CUDA graphs of the pretended device: operators are recorded below autograd, undone, and run again by a replay."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.rehearsal.record import FORBIDDEN, RECORD, Event


class CaptureError(RuntimeError):
    """Something was done during a capture that CUDA forbids there."""


class Recorder(TorchDispatchMode):
    """Records operators, what they wrote over, and what a capture forbids."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Tensor | None]]] = []
        self.overwritten: dict[int, tuple[Tensor, Tensor]] = {}
        self.made: dict[int, Tensor] = {}
        self.forbidden: list[Event] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = dict(zip((one.name for one in func._schema.arguments), args, strict=False)) | kwargs
        for one in func._schema.arguments:
            if one.alias_info is not None and one.alias_info.is_write:
                self._remember(_tensors(given.get(one.name)))
        with RECORD.of() as events:
            result = func(*args, **kwargs)
        self.forbidden += [event for event in events if event.kind in FORBIDDEN]
        inputs = {_storage(tensor) for tensor in _tensors((args, kwargs))}
        fresh = [tensor if _storage(tensor) not in inputs else None for tensor in _tensors(result)]
        self.made |= {_storage(tensor): tensor for tensor in fresh if tensor is not None}
        self.calls.append((func, args, kwargs, fresh))
        return result

    def _remember(self, tensors: list[Tensor]) -> None:
        for tensor in tensors:
            if (key := _storage(tensor)) not in self.overwritten and key not in self.made:
                self.overwritten[key] = (tensor, _bytes(tensor).clone())

    def undo(self) -> None:
        with torch.no_grad():
            for tensor, before in self.overwritten.values():
                _bytes(tensor).copy_(before)

    def repeat(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, fresh in self.calls:
                again = _tensors(func(*args, **kwargs))
                for tensor, value in zip(fresh, again, strict=True):
                    if tensor is not None:
                        tensor.copy_(value)


class Graph:
    """In the place of torch.cuda.CUDAGraph."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.recorder: Recorder | None = None

    def replay(self) -> None:
        assert self.recorder is not None, "replayed before it was captured"
        self.recorder.repeat()

    def reset(self) -> None:
        self.recorder = None

    def pool(self) -> tuple[int, int]:
        return 0, 0

    def register_generator_state(self, generator: Any) -> None: ...


class Capture:
    """In the place of torch.cuda.graph."""

    active = False

    def __init__(self, graph: Graph, *_: Any, **__: Any) -> None:
        self.graph = graph

    def __enter__(self) -> None:
        self.graph.recorder = Recorder()
        Capture.active = True
        self.graph.recorder.__enter__()

    def __exit__(self, *error: Any) -> None:
        recorder = self.graph.recorder
        assert recorder is not None
        recorder.__exit__(*error)
        Capture.active = False
        if error[0] is None and recorder.forbidden:
            lines = "\n".join(f"{event.kind} {event.what} {event.place}" for event in recorder.forbidden)
            raise CaptureError(f"not allowed while a graph is captured:\n{lines}")
        recorder.undo()


def install() -> None:
    """Put these in the places of torch.cuda's."""
    cuda: Any = torch.cuda
    cuda.CUDAGraph, cuda.graph = Graph, Capture
    cuda.is_current_stream_capturing = cuda.graphs.is_current_stream_capturing = lambda: Capture.active
    base: Any = torch.UntypedStorage.__new__

    def new(cls: Any, *args: Any, device: Any = None, **kwargs: Any) -> Any:
        sized = not args or isinstance(args[0], int)
        if device is not None and torch.device(device).type == "cuda" and sized:
            return torch.empty(args[0] if args else 0, dtype=torch.uint8, device=device).untyped_storage()
        return base(cls, *args, **({"device": device} if device is not None else {}), **kwargs)

    torch.UntypedStorage.__new__ = staticmethod(new)  # type: ignore[assignment]


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _bytes(tensor: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
