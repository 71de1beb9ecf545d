"""Replacing a folder by another of its name: what stays is carried over, the change is one step, and it is synced."""

from __future__ import annotations

import os
import shutil
from ctypes import CDLL
from pathlib import Path

from personalize import leftovers


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """Hard links to a file, or to all files of a folder; copies where the disk has no links."""
    if os.path.isdir(source) and not os.path.islink(source):
        shutil.copytree(source, target, symlinks=True, copy_function=link_or_copy)
        return
    try:
        os.link(source, target, follow_symlinks=False)
    except (OSError, NotImplementedError):
        shutil.copy2(source, target, follow_symlinks=False)


def replace_folder(partial: Path, path: Path) -> None:
    """Rename `partial` to `path`; an older folder ends at `partial`'s name, and is never lost on the way."""
    if not path.exists():
        os.rename(partial, path)
    elif not _swap_folders(partial, path):
        old = leftovers.hidden_name(path, "old")
        os.rename(path, old)
        try:
            os.rename(partial, path)
        except BaseException:
            os.rename(old, path)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _swap_folders(first: Path, second: Path) -> bool:
    """Swap two folders in one step where the system knows how (Linux's renameat2); False if it does not."""
    try:
        rename = CDLL(None).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename(here, os.fsencode(first), here, os.fsencode(second), swap) == 0


def sync_folder(path: Path) -> None:
    if os.name == "nt":  # Windows cannot open folders
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
