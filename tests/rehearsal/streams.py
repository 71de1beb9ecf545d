"""Streams, events and the current device of the pretended CUDA: everything is done at once, and waiting is recorded."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tests.rehearsal.record import RECORD


class Stream:
    """A stream of a device; `used` are the streams that work was put on since `install`, with their devices."""

    current: dict[int, Stream] = {}
    index: Callable[[Any], int]
    used: list[Stream] = []

    def __init__(self, device: Any = None, **_: Any) -> None:
        self.device = torch.device("cuda", type(self).index(device))

    def wait_stream(self, other: Stream) -> None: ...

    def wait_event(self, event: Event) -> None: ...

    def record_event(self, event: Event | None = None) -> Event:
        return event or Event()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        RECORD.add("sync", "Stream.synchronize")


class Event:
    def __init__(self, *_: Any, **__: Any) -> None:
        self.time = time.perf_counter()

    def record(self, *_: Any) -> None:
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        RECORD.add("sync", "Event.synchronize")

    def wait(self, *_: Any) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Event) -> float:
        return (other.time - self.time) * 1e3


@contextmanager
def _on(stream: Stream | None) -> Iterator[None]:
    if stream is None:
        yield
        return
    number = stream.device.index
    before, Stream.current[number] = Stream.current.get(number), stream
    Stream.used.append(stream)
    try:
        with torch.cuda.device(number):
            yield
    finally:
        if before is None:
            del Stream.current[number]
        else:
            Stream.current[number] = before


def install(library: Any, index: Callable[[Any], int]) -> None:
    """Put these in the places of torch.cuda's."""
    Stream.index = staticmethod(index)
    default: dict[int, Stream] = {}

    class Device:
        def __init__(self, device: Any) -> None:
            self.number = index(device)

        def __enter__(self) -> None:
            self.before = library.pretended_current()
            library.pretended_set(self.number)

        def __exit__(self, *_: Any) -> None:
            library.pretended_set(self.before)

    def default_stream(device: Any = None) -> Stream:
        return default.setdefault(index(device), Stream(device))

    def current_stream(device: Any = None) -> Stream:
        return Stream.current.get(index(device)) or default_stream(device)

    cuda: Any = torch.cuda
    cuda.Stream, cuda.Event, cuda.stream, cuda.device = Stream, Event, _on, Device
    cuda.current_stream, cuda.default_stream = current_stream, default_stream
    cuda.synchronize = lambda device=None: RECORD.add("sync", "torch.cuda.synchronize")
    torch._C._cuda_getCurrentRawStream = lambda number: 0  # type: ignore[attr-defined]
