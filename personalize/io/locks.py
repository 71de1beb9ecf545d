"""Locks on folders, between processes: a hidden file that says who holds it, with process id and host.

The operating system's own lock on that file decides where it can, so that a killed holder holds nothing.  Where the
disk has no such locks, the file alone counts: it is stale if its process has ended, or if it is another host's and old.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from personalize.errors import UserError
from personalize.io.atomic import DAY, as_user_error, is_running
from personalize.io.json_files import read_json

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

PAUSE = 0.05  # seconds between two attempts


class Locked(UserError):
    """Another process holds the lock."""


@contextmanager
def folder_lock(folder: str | Path, purpose: str = "training", *, wait: float = 0.0) -> Iterator[None]:
    """Hold the lock of `folder` for this `purpose` while the body runs; at most one process holds it.

    The folder is made, and removed again if it is empty then.

    Raises:
        Locked: another process holds it, and still after `wait` seconds.
        UserError: the folder cannot be written.
    """
    folder = Path(folder)
    path = folder / f".{purpose}.lock"
    with as_user_error(folder):
        missing = [place for place in (folder, *folder.parents) if not place.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        handle, deadline = _take(path), time.monotonic() + wait
        while handle is None and time.monotonic() < deadline:
            time.sleep(PAUSE)
            handle = _take(path)
    if handle is None:
        raise Locked(f"{folder} is in use for {purpose} by {_holder(path)}: wait until it ends, or name another folder")
    try:
        yield
    finally:
        if fcntl is None:  # Windows does not remove open files; an empty one is nobody's, should it stay
            os.ftruncate(handle, 0)
            os.close(handle)
        with suppress(OSError):
            path.unlink(missing_ok=True)
        if fcntl is not None:
            os.close(handle)  # after the file has gone: whoever waited for it then looks for it anew
        for place in missing:
            with suppress(OSError):
                place.rmdir()


def _take(path: Path) -> int | None:
    """An open handle of the lock file, which is ours now; None if another process holds it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)  # the last holder may have removed it
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except FileNotFoundError:
        return None
    try:
        if _locked(handle, path) and _is_still(handle, path):
            os.ftruncate(handle, 0)
            os.write(handle, json.dumps({"process": os.getpid(), "host": socket.gethostname()}).encode())
            return handle
    except BaseException:
        os.close(handle)
        raise
    os.close(handle)
    return None


def _locked(handle: int, path: Path) -> bool:
    """Is the file ours by the system's lock, or where there is none, by what stands in it?"""
    if fcntl is not None:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            return False
        except OSError:  # a disk without locks
            pass
    return _is_stale(path)


def _is_still(handle: int, path: Path) -> bool:
    """Is the file that was locked still the one of that name?  Its last holder may have removed it."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _is_stale(path: Path) -> bool:
    about = _read(path)
    if about.get("host") != socket.gethostname() or os.name == "nt":
        return not about or time.time() - path.stat().st_mtime > DAY
    return about["process"] != os.getpid() and not is_running(about["process"])


def _read(path: Path) -> dict[str, Any]:
    """Who holds the lock; empty if nobody has written that."""
    try:
        about = read_json(path)
        return about if isinstance(about.get("process"), int) and isinstance(about.get("host"), str) else {}
    except UserError:
        return {}


def _holder(path: Path) -> str:
    about = _read(path)
    return f"process {about['process']} on {about['host']}" if about else "another process"
