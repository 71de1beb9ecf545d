"""Keeping freed memory in the command line's own training process; nothing that is used as a library calls this.

By default glibc returns freed blocks above 32 MiB to the system, which clears every page when it is asked for again:
a fifth of an update of SD 1.5 on a CPU.
"""

from __future__ import annotations

import ctypes
import sys

# mallopt(3)'s M_MMAP_MAX, M_TRIM_THRESHOLD and M_TOP_PAD: all from the heap, never trimmed, grown by 64 MiB
_KEEP = {-4: 0, -1: -1, -2: 2**26}


def keep_freed_memory() -> None:
    """Let this process keep freed memory until it ends: on Linux with glibc, and unless a GPU does the work."""
    import torch

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None and not torch.cuda.is_available():
        for option, value in _KEEP.items():
            mallopt(option, value)
