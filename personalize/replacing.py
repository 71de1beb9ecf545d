"""Replace a folder by a new one in one step, keep chosen entries of it, and sync folders to the disk."""

from __future__ import annotations

import os
import shutil
from ctypes import CDLL
from pathlib import Path

from personalize import leftovers


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """Put `source`, a file or a folder, at `target` too: as hard links, or as copies where links are impossible."""
    if os.path.isdir(source) and not os.path.islink(source):
        shutil.copytree(source, target, symlinks=True, copy_function=link_or_copy)
        return
    try:
        os.link(source, target, follow_symlinks=False)
    except (OSError, NotImplementedError):
        shutil.copy2(source, target, follow_symlinks=False)


def replace_folder(temporary: Path, path: Path) -> None:
    """Put the folder `temporary` at `path`; an older folder there gets the name `temporary` or is deleted.

    Where the two cannot be swapped in one step, the older folder is renamed first and gets its name back on an error.
    """
    if not path.exists():
        os.rename(temporary, path)
    elif not _swap_folders(temporary, path):
        old = leftovers.hidden_name(path, "old")
        os.rename(path, old)
        try:
            os.rename(temporary, path)
        except BaseException:
            os.rename(old, path)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _swap_folders(first: Path, second: Path) -> bool:
    """Swap two folders in one step by Linux's renameat2; False where that is not possible."""
    try:
        rename = CDLL(None).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename(here, os.fsencode(first), here, os.fsencode(second), swap) == 0


def sync_folder(path: Path) -> None:
    """Wait until a folder's entries are on the disk."""
    if os.name == "nt":  # Windows cannot open folders
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
