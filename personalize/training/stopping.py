"""Requests to stop: a signal ends training after the update at hand, so that a checkpoint can be written."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from personalize.errors import Stopped
from personalize.io.signals import ending_signals_handled

PATIENCE = 60.0  # seconds that a process which writes no checkpoint waits for the one that does


@dataclass
class StopRequest:
    """The first signal that has arrived; None if none has."""

    signal: int | None = None


@contextmanager
def stop_requests(*, deferred: bool = True, leave_after: float | None = None) -> Iterator[StopRequest]:
    """Run the body so that the first SIGINT, SIGTERM or SIGHUP only marks the request; a second one raises at once.

    Signals that are ignored (as SIGHUP under nohup), and those of a thread that is not the main one, stay as they are.

    Args:
        deferred: False leaves signals to raise at once.
        leave_after: seconds after which the process ends whatever it waits for, e.g. a process that has ended.

    Raises:
        Stopped: at the second signal.
    """
    request = StopRequest()
    if not deferred:
        yield request
        return

    def mark(number: int, _: FrameType | None) -> None:
        if request.signal is not None:
            raise Stopped(number)
        request.signal = number
        if leave_after is not None:
            timer = threading.Timer(leave_after, os._exit, [128 + number])
            timer.daemon = True
            timer.start()

    with ending_signals_handled(mark):
        yield request
