"""Write a file or a folder so that a reader sees the old contents or the new ones, and never a part.

What is written stands under a temporary name beside its target until it is complete, synced to the disk and checked;
then it is renamed. Temporary names of writers that were killed are recognised later and removed.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from ctypes import CDLL
from pathlib import Path
from secrets import token_hex
from typing import BinaryIO
from zlib import crc32

from personalize.errors import UserError

Content = bytes | Iterable[bytes]  # of a file; an iterable need not have all parts in memory at once


def create_file(path: Path) -> BinaryIO:
    """Create a file for writing; every file of this project is created here, so that tests can make it fail."""
    return open(path, "xb")


def write_file(path: str | Path, content: Content, *, check: Callable[[Path], object] | None = None) -> Path:
    """Write `content` to `path` atomically: whatever happens, `path` holds all of the old bytes or all of the new ones.

    `check(temporary file)` is called before the new file gets its name.  What killed processes left behind is removed.

    Raises:
        UserError: the disk is full or `path` cannot be written; the old file is unchanged, the temporary file removed.
        Exception: whatever `check` raises, with the same guarantee.
    """
    path = Path(path)
    with _as_user_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(path)
        temporary = hidden_name(path)
        try:
            _write_synced(temporary, content)
            if check is not None:
                check(temporary)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)
    return path


def write_folder(
    path: str | Path,
    files: Mapping[str, Content],
    *,
    check: Callable[[Path], object] | None = None,
    keep: Iterable[str] = (),
) -> Path:
    """Write a folder atomically: whatever happens, `path` is the complete old folder or the complete new one.

    The new folder is built beside `path` under a hidden name.  It replaces the old one in a single step, after
    `check(temporary folder)` has returned.  What killed processes left behind is removed.

    Args:
        path: the folder to write.
        files: the content of each file by name; a slash in a name makes a folder inside.
        check: called with the temporary folder; it raises if something is wrong with it.
        keep: entries of the old folder that the new one keeps, as hard links where the disk has them.

    Raises:
        UserError: the disk is full, or `path` cannot be replaced; the old folder is unchanged.
        Exception: whatever `check` raises, with the same guarantee.
    """
    path = Path(path).resolve()
    _check_folder_path(path)
    with _as_user_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(path)
        temporary = hidden_name(path)
        try:
            temporary.mkdir()
            for name in set(keep) - set(files):
                link_or_copy(path / name, temporary / name)
            for name, content in files.items():
                target = temporary.joinpath(*map(plain_name, name.split("/")))
                target.parent.mkdir(parents=True, exist_ok=True)
                _write_synced(target, content)
            for folder in {temporary, *(path for path in temporary.rglob("*") if path.is_dir())}:
                sync_folder(folder)
            if check is not None:
                check(temporary)
            replace_folder(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)  # this is the old folder, if the two were swapped
        sync_folder(path.parent)
    return path


def check_output_folder(path: str | Path) -> None:
    """UserError unless the folder `path` can be written; called before the work, it leaves nothing behind."""
    path = Path(path).resolve()
    _check_folder_path(path)
    nearest = next(folder for folder in (path, *path.parents) if folder.is_dir())
    with _as_user_error(path), tempfile.TemporaryDirectory(prefix=".personalize-", dir=nearest):
        pass
    if nearest != path:
        top = nearest / path.relative_to(nearest).parts[0]
        with _as_user_error(path):
            path.mkdir(parents=True)
        for folder in (path, *path.parents):
            folder.rmdir()
            if folder == top:
                return


def _check_folder_path(path: Path) -> None:
    """UserError if `path` is a file, or a folder that this program runs in."""
    blocked = next((folder for folder in (path, *path.parents) if folder.exists() and not folder.is_dir()), None)
    if blocked is not None:
        raise UserError(f"{blocked} is a file, a folder was expected: name another output folder")
    if Path.cwd().is_relative_to(path):
        raise UserError(f"{path} is where this program runs and cannot be replaced: name a folder inside it")


def plain_name(name: str) -> str:
    """`name`, if it is safe to join to a folder's path; UserError if it has slashes, is "..", or is no file name."""
    if not name or name in {".", ".."} or any(c in '/\\:*?"<>|' or ord(c) < 32 for c in name):
        raise UserError(f"{name!r} is no plain file name: use letters, digits, spaces, '-', '_' and '.'")
    return name


def _write_synced(path: Path, content: Content) -> None:
    """Create a file, write `content`, and wait until it is on the disk."""
    with create_file(path) as stream:
        for part in [content] if isinstance(content, bytes) else content:
            stream.write(part)
        stream.flush()
        os.fsync(stream.fileno())


@contextmanager
def _as_user_error(path: Path) -> Iterator[None]:
    """Turn an error of the operating system in the body into a UserError about writing `path`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"could not write {path}: {reason}; what was there before is unchanged") from error


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
        old = hidden_name(path, "old")
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
