"""Signals that end the command line's own process, and processes that end when their parent does."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import CDLL
from types import FrameType

from personalize.errors import Stopped

PR_SET_PDEATHSIG = 1  # of Linux's prctl
PAUSE = 1.0  # seconds between two looks at the parent, where the system does not tell


@contextmanager
def signals_raise() -> Iterator[None]:
    """Run the body so that SIGTERM and SIGHUP raise Stopped, as SIGINT raises KeyboardInterrupt: files are tidied up.

    Signals that are ignored or have a handler stay as they are.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    numbers = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, _raise_stopped)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def _raise_stopped(number: int, _: FrameType | None) -> None:
    raise Stopped(number)


def end_with_parent() -> None:
    """Get SIGTERM when the process that started this one has ended, by whatever cause."""
    parent = os.getppid()
    if sys.platform == "linux":
        CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it ended before
            os.kill(os.getpid(), signal.SIGTERM)
        return
    if hasattr(os, "getppid") and os.name != "nt":  # on Windows the id of a parent that has ended stays
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(PAUSE)
    os.kill(os.getpid(), signal.SIGTERM)
