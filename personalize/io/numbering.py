"""New names for results: nothing that lies in a folder is replaced, whoever wrote it."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from itertools import count
from pathlib import Path

from personalize.io.atomic import Content, write_file
from personalize.io.locks import folder_lock

PURPOSE, WAIT = "numbering", 600.0  # of the lock, and the seconds that a process waits for another one's files
DEVICE = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³])(\..*)?", re.IGNORECASE)  # names of Windows


def folded(name: str) -> str:
    """What file systems may take for the same name: without case, in one normal form."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())


def windows_refuses(name: str) -> bool:
    """Can no file of Windows have this name: that of a device, or one that ends in a dot or a space?"""
    return DEVICE.fullmatch(name) is not None or name[-1:] in (".", " ")


def unused_folder(name: str, mark: str) -> Path:
    """The folder `name`, or `name`-2, `name`-3, … : the first that does not hold the file `mark` of a finished run."""
    names = (name if number == 1 else f"{name}-{number}" for number in count(1))
    return next(Path(name) for name in names if not (Path(name) / mark).exists())


def next_number(folder: Path, prefix: str) -> int:
    """The number after the largest N of all files `<prefix>N.*` in `folder`; 0 if there is none."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    matches = [re.match(re.escape(prefix) + r"(\d{1,9})\.", name) for name in names]
    return max((int(match[1]) + 1 for match in matches if match), default=0)


def unused_names(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """`names` if none of them is taken in `folder`, else all of them with the first number that makes them so.

    "edited.png" and "edit.json" become "edited-001.png" and "edit-001.json"; keys are the names that were given.
    """
    names = list(names)
    for number in count():
        numbered = {name: _numbered(name, number) for name in names}
        if not any((folder / name).exists() for name in numbered.values()):
            return numbered
    raise AssertionError("count() does not end")


def _numbered(name: str, number: int) -> str:
    stem, dot, suffix = name.rpartition(".")
    return name if number == 0 else f"{stem}-{number:03d}{dot}{suffix}"


def add_files(folder: Path, files: Mapping[str, Content]) -> dict[str, str]:
    """Write `files` into `folder` under names that are not taken; returns these, by the names that were given.

    Of several processes that add files to one folder, each waits until another has written all of its own.

    Raises:
        UserError: the disk is full or the folder cannot be written; see `write_file`.
    """
    with folder_lock(folder, PURPOSE, wait=WAIT):
        return _added(folder, files)


def add_numbered(folder: Path, prefix: str, make: Callable[[int], Mapping[str, Content]]) -> dict[str, str]:
    """`add_files` of what `make` gives for the next free number of the folder's `prefix`, e.g. 7 after edit-006.png.

    The names of `make` that begin with `prefix` must hold numbers from that one on.
    """
    with folder_lock(folder, PURPOSE, wait=WAIT):
        files = make(next_number(folder, prefix))
        numbered = {name: content for name, content in files.items() if name.startswith(prefix)}
        others = {name: content for name, content in files.items() if name not in numbered}
        return _added(folder, numbered) | _added(folder, others)


def _added(folder: Path, files: Mapping[str, Content]) -> dict[str, str]:
    names = unused_names(folder, files)
    for name, content in files.items():
        write_file(folder / names[name], content)
    return names
