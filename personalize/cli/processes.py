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

from personalize.errors import Stopped, UserError
from personalize.io.signals import ending_signals_handled

PR_SET_PDEATHSIG = 1  # of Linux's prctl
PAUSE = 1.0  # seconds between two looks at the parent, where the system does not tell


@contextmanager
def signals_raise() -> Iterator[None]:
    """Run the body so that SIGINT, SIGTERM and SIGHUP raise Stopped, a KeyboardInterrupt: files are tidied up.

    Signals that are ignored or have a handler stay as they are.  A library whose import is broken off may go on and
    fail in a way of its own: an exception that is not ours and leaves the body after a signal becomes Stopped.
    """
    received: list[int] = []

    def stop(number: int, _: FrameType | None) -> None:
        received.append(number)
        raise Stopped(number)

    defaults = (signal.SIG_DFL, signal.default_int_handler)
    try:
        with ending_signals_handled(stop, replaces=lambda before: before in defaults):
            yield
    except Exception as error:
        if received and not isinstance(error, UserError):
            raise Stopped(received[0]) from error
        raise


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
