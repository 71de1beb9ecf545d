"""The record of what makes the host wait for the pretended device: synchronisations and copies, with who asked."""

from __future__ import annotations

import ctypes
import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = f"{Path(__file__).parents[2]}/"
BLOCKING = ("sync", "h2d")  # reads of the device, and copies to it that are not asynchronous
FORBIDDEN = ("sync", "h2d", "h2d_async", "d2h_async")  # while a CUDA graph is captured
LISTENER = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int64)


@dataclass(frozen=True)
class Event:
    """One event.

    kind: "sync" (the host reads a tensor, or waits), "h2d" (a copy from the host that waits; "h2d_async": does not),
        "d2h_async", "d2d" (from one device to another).
    place: the innermost line of the package, or of a library if the package has no part in it.
    """

    kind: str
    what: str
    size: int
    place: str


class Record:
    """All events since the last `clear`."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.counts: dict[str, float] = {}  # waits for each further step, by flow
        self.flow = ""
        self._listener = LISTENER(lambda kind, what, size: self.add(kind.decode(), what.decode(), size))

    def listen(self, library: Any) -> None:
        library.pretended_listen(self._listener)

    def add(self, kind: str, what: str, size: int = 0) -> None:
        self.events.append(Event(kind, what, size, _place()))

    def clear(self) -> None:
        self.events.clear()

    @contextmanager
    def of(self) -> Iterator[list[Event]]:
        """A list that holds the events of the body afterwards."""
        found: list[Event] = []
        first = len(self.events)
        yield found
        found += self.events[first:]


RECORD = Record()


def blocking(events: list[Event]) -> list[Event]:
    """Those for which the host waits."""
    return [event for event in events if event.kind in BLOCKING]


def table(events: list[Event]) -> str:
    """A line for each place, those with most events first."""
    counts = Counter((event.kind, event.what, event.place) for event in events)
    return "\n".join(f"{count:5d} {kind:9s} {what:28s} {place}" for (kind, what, place), count in counts.most_common())


def _place() -> str:
    try:
        frames = traceback.extract_stack(sys._getframe(2))
    except ValueError:  # called by a thread without Python frames
        return "a thread of autograd"
    own = [frame for frame in frames if frame.filename.startswith(f"{ROOT}personalize")]
    last = (own or frames)[-1]
    return f"{last.filename.removeprefix(ROOT)}:{last.lineno} {last.name}"
