"""Read files that others have made: plain files alone, and never more bytes of one than stated.

A pipe, a socket or a device can make a program wait for ever or never end, so it is refused wherever a file is read:
every reader of this package opens its files here.
"""

from __future__ import annotations

import codecs
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO

from personalize.errors import UserError

MAX_TEXT_BYTES = 16 * 2**20
MAX_PICTURE_BYTES = 4 * 2**30  # 150 million pixels of four 64-bit numbers
CHUNK = 2**20
SYSTEM_NAMES = {"__macosx", "thumbs.db", "desktop.ini", "icon\r"}  # what systems put into folders, hidden there
_ENCODINGS = {  # by the mark at the beginning; the four bytes of UTF-32's first, because they begin with UTF-16's
    codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip


@contextmanager
def opened(path: str | Path, most: int | None = None) -> Iterator[BinaryIO]:
    """Open a plain file of at most `most` bytes for reading; nothing else is opened, and nothing waits.

    Raises:
        UserError: it is missing, a folder, a pipe or a device, too large, or cannot be read.
    """
    path = Path(path)
    try:
        _require_plain(os.stat(path), path, most)  # a device may do something as soon as it is opened
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with open(handle, "rb") as stream:
            _require_plain(os.fstat(handle), path, most)  # it may have been exchanged
            yield stream
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise UserError(f"{path} does not exist: check the path") from None
        raise UserError(f"could not read {path}: {error.strerror or error}") from error
    except ValueError as error:
        if "null" in str(error):  # a 0 byte in the name
            raise UserError(f"{str(path)!r} cannot be the name of a file: check the path") from None
        raise


def _require_plain(about: os.stat_result, path: Path, most: int | None) -> None:
    if not stat.S_ISREG(about.st_mode):
        raise UserError(f"{path} is {kind(about.st_mode)}, expected a plain file: save the contents to a file first")
    if most is not None and about.st_size > most:
        raise UserError(f"{path} has {about.st_size:,} bytes, at most {most:,} were expected: is it the right file?")


def kind(mode: int) -> str:
    """What a file of this `st_mode` is, in words."""
    if stat.S_ISDIR(mode):
        return "no file but a folder"
    return "a plain file" if stat.S_ISREG(mode) else "a pipe or a device"


def is_plain(path: Path) -> bool:
    """Is there a plain file?  Not at a path that the system cannot look up, such as one too long or with a NUL."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def at_home(path: str | Path) -> Path:
    """`path` with `~` in front as the home folder; as it is if no such user is known, for files are so called too."""
    return Path(os.path.expanduser(path))


def is_hidden(name: str) -> bool:
    """Is the name hidden by its dot (as macOS' `._1.png`), or one that a system puts into folders?"""
    return name.startswith(".") or name.lower() in SYSTEM_NAMES


def visible(folder: Path, pattern: str = "*") -> list[Path]:
    """The files and folders in `folder` that fit the pattern and are not hidden, by name.

    On disks of other systems macOS puts `._model.safetensors` beside every model.safetensors, which is none.
    """
    return sorted(path for path in folder.glob(pattern) if not is_hidden(path.name))


def read_bytes(path: str | Path, most: int = MAX_TEXT_BYTES) -> bytes:
    """The contents of a plain file of at most `most` bytes; UserError as `opened`."""
    with opened(path, most) as stream:
        content = stream.read(most + 1)  # files of a system's own, such as those in /proc, do not tell their length
    if len(content) > most:
        raise UserError(f"{path} has more than {most:,} bytes, fewer were expected: is it the right file?")
    return content


def read_text(path: str | Path, most: int = MAX_TEXT_BYTES) -> str:
    """The text of a plain file in UTF-8, or in UTF-16 or -32 with a byte order mark; without the mark.

    Raises:
        UserError: as `opened`, and another encoding.
    """
    content = read_bytes(path, most)
    encoding = next((name for mark, name in _ENCODINGS.items() if content.startswith(mark)), "utf-8")
    with suppress(UnicodeDecodeError):
        text = content.decode(encoding)
        if encoding != "utf-8" or not _like_wide_text(content):
            return text
    raise UserError(f"{path} is not UTF-8 text: save it as UTF-8")


def _like_wide_text(content: bytes) -> bool:
    """Whether these bytes may be UTF-16 or UTF-32 without a mark: zeros at every second place alone, or in half."""
    first, second = content[::2].count(0), content[1::2].count(0)
    by_turns = min(first, second) == 0 and max(first, second) > 1
    return len(content) % 2 == 0 and (by_turns or 0 < len(content) <= 2 * (first + second))


def file_hash(path: str | Path) -> str:
    """The SHA-256 of a plain file in hexadecimal digits, read in parts; UserError as `opened`."""
    digest = sha256()
    with opened(path) as stream:
        left = os.fstat(stream.fileno()).st_size
        while part := stream.read(min(CHUNK, max(left, 0))):
            digest.update(part)
            left -= len(part)
    return digest.hexdigest()


def require_plain_tree(folder: str | Path) -> None:
    """UserError if a folder whose files a library is going to read holds a pipe or a device."""
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent, name)
            if path.exists() and not stat.S_ISREG(mode := os.stat(path).st_mode):
                raise UserError(f"{path} is {kind(mode)}, expected plain files: remove it from {folder}")
