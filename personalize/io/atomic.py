"""Write a file or a folder so that a reader sees the old contents or the new ones, and never a part.

What is written stands under a temporary name until it is complete, synced to the disk and checked; then it is renamed.
A folder that exists is never replaced: its files are, one by one, from a journal inside it that the next reader or
writer completes if the process is killed in between.  So no file of another origin is moved or removed, and the folder
may be a mount point or the one that this program runs in.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex
from typing import BinaryIO
from zlib import crc32

from personalize.errors import UserError
from personalize.io.json_files import parse_json
from personalize.io.plain_files import read_bytes

Content = bytes | Iterable[bytes]  # of a file; an iterable need not have all parts in memory at once
JOURNAL = "personalize"  # what hidden names in a folder begin with, if they hold its next contents
REMOVED, REPLACED = ".removed.json", ".replaced"  # in a journal: the files to remove, and the folder of old versions
LONGEST_NAME = 210  # bytes of a name that a hidden name repeats; file systems allow 255 in all


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
    with as_user_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(path)
        temporary = hidden_name(path)
        try:
            write_synced(temporary, content)
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
    remove: Iterable[str] = (),
) -> Path:
    """Write `files` into a folder: after an error it is as it was before, and a new folder appears complete.

    The files are written under a hidden name, and `check(temporary folder)` has returned before any gets its own.
    Other files in the folder stay where they are.  If the process is killed while the files get their names, the next
    `write_folder` or `remove_stale` completes that.

    Args:
        path: the folder to write.
        files: the content of each file by name; a slash in a name makes a folder inside.
        check: called with the temporary folder; it raises if something is wrong with it.
        remove: names of files in the folder that go when the new ones come.

    Raises:
        UserError: the disk is full, or `path` cannot be written; the folder is unchanged.
        Exception: whatever `check` raises, with the same guarantee.
    """
    path = folder_path(path)
    with as_user_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(path)
        temporary = hidden_name(path / JOURNAL) if path.is_dir() else hidden_name(path)
        try:
            temporary.mkdir()
            for name, content in files.items():
                target = temporary.joinpath(*map(plain_name, name.split("/")))
                target.parent.mkdir(parents=True, exist_ok=True)
                write_synced(target, content)
            for folder in {temporary, *(path for path in temporary.rglob("*") if path.is_dir())}:
                sync_folder(folder)
            if check is not None:
                check(temporary)
            if path.is_dir() or not _renamed(temporary, path):
                temporary = _commit(temporary, path, set(remove) - set(files))
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        sync_folder(path.parent)
    return path


def folder_path(path: str | Path) -> Path:
    """`path` without links and dots; UserError if it is or lies in a file, or is no path."""
    try:
        path = Path(path).resolve()
        blocked = next((folder for folder in (path, *path.parents) if folder.exists() and not folder.is_dir()), None)
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle, a name too long, a NUL
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{str(path)[:120]!r} cannot be a folder: {reason}; name another output folder") from None
    if blocked is not None:
        raise UserError(f"{blocked} is a file, a folder was expected: name another output folder")
    return path


def plain_name(name: str) -> str:
    """`name`, if it is safe to join to a folder's path; UserError if it has slashes, is "..", or is no file name."""
    if not name or name in {".", ".."} or any(c in '/\\:*?"<>|' or ord(c) < 32 for c in name):
        raise UserError(f"{name!r} is no plain file name: use letters, digits, spaces, '-', '_' and '.'")
    return name


def write_synced(path: Path, content: Content) -> None:
    """Create a file, write `content`, and wait until it is on the disk."""
    with create_file(path) as stream:
        for part in [content] if isinstance(content, bytes) else content:
            stream.write(part)
        stream.flush()
        os.fsync(stream.fileno())


@contextmanager
def as_user_error(path: Path) -> Iterator[None]:
    """Turn an error of the operating system in the body into a UserError about writing `path`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        kept = "what was there before is unchanged" if os.path.lexists(path) else "nothing was written"
        raise UserError(f"could not write {path}: {reason}; {kept}") from error


def _renamed(temporary: Path, path: Path) -> bool:
    """Give a complete new folder its name; False if somebody else has made a folder of that name meanwhile."""
    try:
        os.rename(temporary, path)
        return True
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.EBUSY):
            return False
        raise


def _commit(temporary: Path, path: Path, remove: set[str]) -> Path:
    """Give the files in `temporary` their names in `path`; returns the journal, which is empty then.

    From the first rename on, a killed process has decided for the new files.  After an error the old ones come back.
    """
    journal = hidden_name(path / JOURNAL, "commit")
    names = [file.relative_to(temporary).as_posix() for file in temporary.rglob("*") if not file.is_dir()]
    for name in [*names, *remove]:
        if (path / name).is_dir():
            raise UserError(f"{path / name} is a folder, a file was expected: name another output folder")
        if (path / name).exists():
            (temporary / REPLACED / name).parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(path / name, temporary / REPLACED / name)
    write_synced(temporary / REMOVED, json.dumps(sorted(remove)).encode())
    sync_folder(temporary)
    os.rename(temporary, journal)
    try:
        _complete(journal, path)
    except BaseException:
        _take_back(journal, path, names)
        raise
    return journal


def _complete(journal: Path, path: Path) -> None:
    """Move every file that is left in `journal` into `path`, and remove what goes."""
    for file in sorted(journal.rglob("*")):
        name = file.relative_to(journal)
        if name.parts[0] not in (REMOVED, REPLACED) and not file.is_dir():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, path / name)
    for name in parse_json(read_bytes(journal / REMOVED), journal / REMOVED):
        (path / name).unlink(missing_ok=True)
    sync_folder(path)
    shutil.rmtree(journal)


def _take_back(journal: Path, path: Path, names: Iterable[str]) -> None:
    """Undo `_complete`: the old versions get their names back, and new files go."""
    old = journal / REPLACED
    if not journal.exists():  # all was done
        return
    for name in names:
        if not (journal / name).exists() and not (old / name).exists():
            (path / name).unlink(missing_ok=True)
    for file in sorted(old.rglob("*")):
        if not file.is_dir():
            os.replace(file, path / file.relative_to(old))
    shutil.rmtree(journal, ignore_errors=True)


DAY = 86_400  # seconds
_own_names: set[str] = set()  # hidden names of this process: in a container a dead process may have had the same id


def hidden_name(path: Path, ending: str = "partial") -> Path:
    """A new hidden name beside `path`: "partial" for what is being written, "commit" for what is complete."""
    name = f".{_stem(path.name)}.{_machine_id()}-{os.getpid()}-{token_hex(4)}.{ending}"
    _own_names.add(name)
    return path.with_name(name)


def _stem(name: str) -> str:
    """`name`, or a checksum of it where a hidden name would become too long for a file system."""
    return name if len(os.fsencode(name)) <= LONGEST_NAME else f"{crc32(os.fsencode(name)):08x}"


def remove_stale(path: str | Path) -> None:
    """Remove temporary files and folders of killed processes beside `path` and in it, and complete what was decided.

    Raises:
        UserError: new files in the folder `path` wait for their names, and cannot get them.
    """
    path = Path(path)
    for entry, ending in [*_left_behind(path.parent, path.name), *_left_behind(path, JOURNAL)]:
        if ending == "commit" and (entry / REMOVED).is_file():
            with as_user_error(path):
                _complete(entry, path)
        elif entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            with suppress(OSError):
                entry.unlink(missing_ok=True)


def _left_behind(folder: Path, name: str) -> list[tuple[Path, str]]:
    """Hidden entries of `folder` for the file or folder `name`, and their endings, whose process has ended."""
    pattern = re.compile(re.escape(f".{_stem(name)}.") + r"([0-9a-f]{8})-(\d{1,9})-[0-9a-f]{8}\.(commit|partial)-*")
    entries = folder.iterdir() if folder.is_dir() else ()
    matches = [(entry, match) for entry in entries if (match := pattern.fullmatch(entry.name))]
    return [(entry, match[3]) for entry, match in matches if not _may_be_in_use(match[1], int(match[2]), entry)]


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
    return entry.name in _own_names if process == os.getpid() else is_running(process)


def is_running(process: int) -> bool:
    """Is there a process with this id on this machine?  Not for Windows."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """Put the file `source` at `target` too: as a hard link, or as a copy where links are impossible."""
    try:
        os.link(source, target, follow_symlinks=False)
    except (OSError, NotImplementedError):
        shutil.copy2(source, target, follow_symlinks=False)


def sync_folder(path: Path) -> None:
    """Wait until a folder's entries are on the disk."""
    if os.name == "nt":  # Windows cannot open folders
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
