"""Output folders are tried before the work: made, written into, and compared with the space that is needed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from personalize.errors import UserError
from personalize.io.atomic import JOURNAL, as_user_error, folder_path, hidden_name, write_synced

MEGABYTE = 10**6


def check_output_folder(path: str | Path, names: tuple[str, ...] = ()) -> None:
    """UserError unless files can be written into the folder `path`; it leaves nothing behind.

    The folder is made, and a small file written, synced to the disk, and renamed to names as long as `names` and as
    the hidden ones that a save uses.
    """
    path = folder_path(path)
    with as_user_error(path), _made(path):
        longest = max((len(os.fsencode(name)) for name in names), default=0)
        probe = hidden_name(path / JOURNAL)
        target = probe.with_name(probe.name + "-" * max(1, longest - len(os.fsencode(probe.name))))
        try:
            write_synced(probe, b"personalize")
            os.replace(probe, target)
        finally:
            probe.unlink(missing_ok=True)
            target.unlink(missing_ok=True)


def check_space(path: str | Path, file_bytes: int, all_bytes: int) -> None:
    """UserError unless the disk of the folder `path` has room for `all_bytes`, and for one file of `file_bytes`.

    The file is reserved and given back, so that quotas and limits on the size of files count too.
    """
    path = folder_path(path)
    with as_user_error(path), _made(path):
        free = shutil.disk_usage(path).free
        if free < max(file_bytes, all_bytes):
            raise UserError(
                f"{path} has {free / MEGABYTE:.0f} MB free, and {max(file_bytes, all_bytes) / MEGABYTE:.0f} MB will be "
                "written: make room, keep fewer checkpoints, or name another --output_dir"
            )
        if hasattr(os, "posix_fallocate") and file_bytes > 0:
            probe = hidden_name(path / JOURNAL)
            handle = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                os.posix_fallocate(handle, 0, file_bytes)
            finally:
                os.close(handle)
                probe.unlink(missing_ok=True)


@contextmanager
def _made(path: Path) -> Iterator[None]:
    """Run the body with the folder `path`; the folders that were made for it are removed again if they are empty."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()


def is_tensor_name(path: Path) -> bool:
    """Does the name end in .safetensors?  In capitals it is the same ending."""
    return path.suffix.lower() == ".safetensors"


def require_tensor_name(path: Path) -> Path:
    """`path`, if its name ends in .safetensors: under any other, programs take the file for a pickle or for none."""
    if not is_tensor_name(path):
        raise UserError(f"{path} does not end in .safetensors, by which programs know such a file: name another output")
    return path


def require_absent(path: Path) -> Path:
    """`path`, if nothing exists there; else UserError, so that an export never overwrites its source."""
    if path.exists() or path.is_symlink():
        raise UserError(f"{path} exists already: name another output, or remove it first")
    return path
