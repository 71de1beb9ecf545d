"""Leftovers: hidden names for what is being written, by which the remains of a killed writer are known later.

A name says which machine and process it belongs to: `.my-cat.1a2b3c4d-4711-5e6f7a8b.partial`.  Files and folders of a
process that lives, or of another machine within a day, are left alone.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import time
from pathlib import Path
from secrets import token_hex
from zlib import crc32

DAY = 86_400  # seconds


def hidden_name(path: Path, ending: str = "partial") -> Path:
    """A fresh name beside `path`: "partial" for something unfinished, "old" for a folder about to be replaced."""
    return path.with_name(f".{path.name}.{_machine_id()}-{os.getpid()}-{token_hex(4)}.{ending}")


def remove_stale(path: Path) -> None:
    """Remove what killed writers of `path` left beside it; an old folder moved aside, and not replaced, comes back."""
    pattern = re.compile(re.escape(f".{path.name}.") + r"([0-9a-f]{8})-(\d{1,9})-[0-9a-f]{8}\.(old|partial)")
    found = [(entry, match) for entry in path.parent.iterdir() if (match := pattern.fullmatch(entry.name))]
    for entry, match in sorted(found, key=lambda pair: pair[1][3]):  # old before partial
        if _at_work(match[1], int(match[2]), entry):
            continue
        if match[3] == "old" and not path.exists():
            os.rename(entry, path)
        elif entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


def _machine_id() -> str:
    return f"{crc32(socket.gethostname().encode()):08x}"


def _at_work(machine: str, process: int, entry: Path) -> bool:
    """May the writer of `entry` still be at it?"""
    if machine != _machine_id() or os.name == "nt":  # asking after a process would end it on Windows
        try:
            return time.time() - entry.lstat().st_mtime < DAY
        except OSError:
            return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True
