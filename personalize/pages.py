"""Memory that the process keeps between uses.

glibc gives blocks above 32 MiB back to the system as soon as they are free, and the system clears every page of them
when they are asked for again.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -2, -3, -4  # names of mallopt(3), without their M
_KEPT = {_MMAP_MAX: 0, _TRIM_THRESHOLD: -1, _TOP_PAD: 2**26}
_RETURNED = {_MMAP_MAX: 2**16, _MMAP_THRESHOLD: 2**25, _TRIM_THRESHOLD: 2**26, _TOP_PAD: 2**17}  # what glibc ends with
_nested = [False]


@contextmanager
def kept_pages(wanted: bool = True) -> Iterator[None]:
    """Run the body with freed memory kept for the next use (not `wanted`: given back); contexts may be nested.

    Of the whole process, and of Linux with glibc alone; elsewhere nothing is changed.
    """
    _nested.append(wanted)
    _set(wanted)
    try:
        yield
    finally:
        _nested.pop()
        _set(_nested[-1])


def _set(kept: bool) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for option, value in (_KEPT if kept else _RETURNED).items():
            mallopt(option, value)
