"""What the command line's own training process does with freed memory; nothing that is used as a library calls this.

By default glibc returns freed blocks above 32 MiB to the system, which clears every page when it is asked for again.
What that costs an update: `python -m tests.bench.speed --only pages`.  Smaller blocks it keeps for reuse, among them
most weights of a text encoder.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping

# mallopt(3)'s M_MMAP_MAX, M_TRIM_THRESHOLD and M_TOP_PAD: all from the heap, never trimmed, grown by 64 MiB
_KEEP = {-4: 0, -1: -1, -2: 2**26}
_RETURN = {-3: 2**18}  # M_MMAP_THRESHOLD: blocks of 256 KiB and more are returned when they are freed


def keep_freed_memory() -> None:
    """Let this process keep freed memory until it ends: on Linux with glibc, and unless a GPU does the work."""
    _set(_KEEP)


def return_freed_memory() -> None:
    """Let this process return freed memory at once, also that of weights which left: where it could be kept."""
    _set(_RETURN)


def _set(options: Mapping[int, int]) -> None:
    import torch

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None and not torch.cuda.is_available():
        for option, value in options.items():
            mallopt(option, value)
