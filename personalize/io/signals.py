"""A handler of the signals that end a process, for the time of a body."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

ENDING = ("SIGINT", "SIGTERM", "SIGHUP")  # a system may lack some of them


@contextmanager
def ending_signals_handled(
    handler: Callable[[int, FrameType | None], None],
    replaces: Callable[[Any], bool] = lambda before: before != signal.SIG_IGN,
) -> Iterator[None]:
    """Run the body with `handler` for SIGINT, SIGTERM and SIGHUP where it `replaces` the present handler.

    By default only signals that are ignored stay so, as SIGHUP under nohup.  Handlers that are not Python's, which it
    cannot put back, stay too.  In a thread that is not the main one, in which Python lets no handler be set, all do.
    """
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        numbers = [getattr(signal, name) for name in ENDING if hasattr(signal, name)]
        present = {number: signal.getsignal(number) for number in numbers}
        before = {number: old for number, old in present.items() if old is not None and replaces(old)}
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
