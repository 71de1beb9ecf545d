"""Names of temporary files and folders, and the removal of those that killed processes left behind.

A temporary name says which machine and which process wrote it: `.my-cat.1a2b3c4d-4711-5e6f7a8b.partial` is of machine
1a2b3c4d and process 4711.  It is removed only if that process no longer runs or, on another machine, after a day.
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
    """A new hidden name beside `path`: "partial" for what is being written, "old" for a folder being replaced."""
    return path.with_name(f".{path.name}.{_machine_id()}-{os.getpid()}-{token_hex(4)}.{ending}")


def remove_stale(path: Path) -> None:
    """Remove temporary files and folders that killed processes left beside `path`.

    A folder "old" gets its name `path` back if the process was killed before it put the new folder there.
    """
    pattern = re.compile(re.escape(f".{path.name}.") + r"([0-9a-f]{8})-(\d{1,9})-[0-9a-f]{8}\.(old|partial)")
    matches = [(entry, match) for entry in path.parent.iterdir() if (match := pattern.fullmatch(entry.name))]
    for entry, match in sorted(matches, key=lambda pair: pair[1][3]):  # "old" before "partial"
        if _may_be_in_use(match[1], int(match[2]), entry):
            continue
        if match[3] == "old" and not path.exists():
            os.rename(entry, path)
        elif entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


def _machine_id() -> str:
    """8 hexadecimal digits that stand for this machine's host name."""
    return f"{crc32(socket.gethostname().encode()):08x}"


def _may_be_in_use(machine: str, process: int, entry: Path) -> bool:
    """True unless the process that writes `entry` is known to have ended, or `entry` is another machine's and old."""
    if machine != _machine_id() or os.name == "nt":  # on Windows os.kill(process, 0) would end the process
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
