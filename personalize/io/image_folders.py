"""Read a folder of pictures: every picture with its metadata, and every file that is left out with the reason."""

from __future__ import annotations

import os
import re
import stat
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from personalize.errors import UserError
from personalize.io.image_files import HEIF_HINT, NotAnImage, check_image, register_heif
from personalize.io.image_metadata import (
    CAPTION_SUFFIXES,
    HEIF_SUFFIXES,
    IMAGE_SUFFIXES,
    METADATA_NAMES,
    Row,
    caption_files,
    metadata_file,
    read_rows,
)  # fmt: skip
from personalize.io.json_files import read_json
from personalize.io.plain_files import is_hidden

MANIFEST = "adapter.json"  # of an adapter folder, which lists the files that are its own
VALIDATION, VALIDATED = "validation", re.compile(r"\d{6}-\d+\.png")  # the folder of pictures that trainings draw
OUTPUT_NAMES = (MANIFEST, "edits.json", "ranking.json", "edit.json", "drag.json")  # in folders written by us
FILE_NAME = "file_name"  # the metadata column of the picture; others, such as mask_file_name, end like it


@dataclass(frozen=True)
class FolderImage:
    """A picture in a folder: the columns of its metadata row, and the other files that this row names, by column."""

    path: Path
    columns: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, Path] = field(default_factory=dict)
    where: str = ""


@dataclass(frozen=True)
class ImageFolder:
    """The pictures of a folder in the order of their names, and what was left out: reason → paths within the folder."""

    path: Path
    images: tuple[FolderImage, ...]
    left_out: Mapping[str, tuple[str, ...]]

    def remarks(self) -> list[str]:
        """A line for each reason why files were left out, with their names."""
        return [f"left out of {self.path}, {reason}: {', '.join(names)}" for reason, names in self.left_out.items()]


def read_folder(path: str | Path) -> ImageFolder:
    """The pictures in a folder and its subfolders, except hidden ones and folders that this program wrote.

    Each folder may hold a `metadata.jsonl`, `.csv` or `.parquet` with the columns of 🤗 datasets' imagefolder:
    `file_name`, a path within the folder, then any others; a column that ends in `_file_name` names a further picture,
    such as a mask, which is not one of the folder's pictures.  Names are taken as they are: no patterns, no splits.

    Raises:
        UserError: no folder, no picture in it, or metadata that cannot be read or that names a file which is not there.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; check the path of the folder of pictures")
    left_out: dict[str, list[str]] = {}
    files = sorted(_files(path, left_out), key=lambda file: file.parts)
    found = {_key(file): file for file in files}
    rows = [(file, row) for file in files if file.name in METADATA_NAMES for row in read_rows(file)]
    for folder in {file.parent for file, _ in rows}:
        metadata_file(folder)  # refuses two in one folder
    named = [_named(file.parent, row, found) for file, row in rows]
    others = {other for image in named for other in image.files.values()} - {image.path for image in named}
    by_path: dict[Path, list[FolderImage]] = {}
    for image in named:
        by_path.setdefault(image.path, []).append(image)
    pictures = [file for file in files if file not in others and _is_picture(file, path, left_out)]
    images = [image for file in pictures for image in by_path.get(file, [FolderImage(file)])]
    _report_strangers(files, pictures, others, path, left_out)
    reasons = {reason: tuple(names) for reason, names in left_out.items()}
    folder = ImageFolder(path, tuple(images), reasons)
    if not images:
        remarks = "; ".join(folder.remarks())
        raise UserError(f"{path} holds no picture: put PNG or JPEG files into it{'; ' + remarks if remarks else ''}")
    return folder


def only_picture(path: str | Path) -> Path:
    """The picture file at `path`: the file itself, or the only picture in a folder.

    Raises:
        UserError: nothing there, or a folder with no picture or with several.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; check the path of the picture")
    if not path.is_dir():
        return path
    pictures = [image.path for image in read_folder(path).images]
    if len(pictures) != 1:
        names = ", ".join(str(picture.relative_to(path)) for picture in pictures[:3])
        raise UserError(f"{path} must hold exactly one picture, found {len(pictures)} ({names}): name the file itself")
    return pictures[0]


def _files(top: Path, left_out: dict[str, list[str]]) -> Iterator[Path]:
    """All files below `top`, without what is hidden; every folder is visited once."""
    visited = set()
    for parent, folders, names in os.walk(top, followlinks=True):
        here = Path(parent)
        identity = os.stat(here).st_dev, os.stat(here).st_ino
        if identity in visited:  # a link that leads back up
            folders.clear()
            continue
        visited.add(identity)
        if here != top and (marks := [name for name in OUTPUT_NAMES if name in names]):
            folders.clear()
            _leave_out(left_out, f"written by this program ({marks[0]})", here, top)
            continue
        folders[:] = [name for name in folders if not is_hidden(name)]
        ours = _ours(here, names)
        for name in names:
            if is_hidden(name):
                continue
            if name in ours:
                _leave_out(left_out, ours[name], here / name, top)
            elif not (here / name).exists():
                _leave_out(left_out, "a link to nothing", here / name, top)
            elif not stat.S_ISREG(os.stat(here / name).st_mode):
                _leave_out(left_out, "a pipe or a device", here / name, top)
            else:
                yield here / name


def _ours(folder: Path, names: list[str]) -> dict[str, str]:
    """Those files `names` of a folder that a training has written into it, with the reason why they are left out.

    It may have written into the very folder that it learned: what it drew then is nothing to learn.
    """
    if folder.name == VALIDATION:
        return {name: "drawn while training" for name in names if VALIDATED.fullmatch(name)}
    if MANIFEST not in names:
        return {}
    try:
        listed = read_json(folder / MANIFEST).get("files")
    except UserError:
        return {}
    listed = listed if isinstance(listed, list) else []
    return {name: f"written by this program ({MANIFEST})" for name in listed if name in names}


def _leave_out(left_out: dict[str, list[str]], reason: str, path: Path, top: Path) -> None:
    left_out.setdefault(reason, []).append(str(path.relative_to(top)))


def _is_picture(file: Path, top: Path, left_out: dict[str, list[str]]) -> bool:
    """Can the file be read as a picture?  One that is called a picture but is none is noted in `left_out`."""
    suffix = file.suffix.lower()
    if suffix not in IMAGE_SUFFIXES:
        return False
    if suffix in HEIF_SUFFIXES and not register_heif():
        _leave_out(left_out, HEIF_HINT, file, top)
        return False
    try:
        check_image(file)
    except NotAnImage:
        _leave_out(left_out, "no picture in spite of the name", file, top)
        return False
    return True


def _report_strangers(
    files: list[Path], pictures: list[Path], others: set[Path], top: Path, left_out: dict[str, list[str]]
) -> None:
    """Note in `left_out` the files that are no pictures and belong to none."""
    captions = {file for picture in pictures for file in caption_files(picture)}
    for file in files:
        if file.suffix.lower() in IMAGE_SUFFIXES or file in others or file.name in METADATA_NAMES or file in captions:
            continue
        caption = file.suffix.lower() in CAPTION_SUFFIXES
        _leave_out(left_out, "a caption without a picture of that name" if caption else "no picture", file, top)


def _named(folder: Path, row: Row, found: Mapping[str, Path]) -> FolderImage:
    """The picture that a metadata row in `folder` names, with its other columns."""
    paths = {
        name: _find(folder, str(value), row.where, found)
        for name, value in row.columns.items()
        if value is not None and (name == FILE_NAME or name.endswith(f"_{FILE_NAME}"))
    }
    columns = {name: value for name, value in row.columns.items() if name not in paths}
    return FolderImage(paths.pop(FILE_NAME), columns, paths, row.where)


def _find(folder: Path, name: str, where: str, found: Mapping[str, Path]) -> Path:
    """The file that metadata in `folder` calls `name`; its characters may be composed otherwise, as macOS does."""
    path = Path(os.path.normpath(folder / name.replace("\\", "/")))
    if not path.is_relative_to(os.path.normpath(folder)):
        raise UserError(f"{where} names {name}, which is outside {folder}: put the file into that folder")
    if (known := found.get(_key(path))) is not None:
        return known
    raise UserError(f"{where} names {name}, which is not in {folder}: correct the name, or remove the row")


def _key(path: Path) -> str:
    return unicodedata.normalize("NFC", os.path.normpath(path))
