"""The names of picture files, and what stands about them in metadata files and in captions beside them.

Pictures are recognised by their suffix; `metadata.jsonl`, `.csv` or `.parquet` has a row for each, and a text file
beside a picture holds its caption.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from personalize.errors import UserError
from personalize.io.json_files import parse_json
from personalize.io.plain_files import MAX_TEXT_BYTES, opened, read_text
from personalize.io.tables import MAX_ROWS, SURPLUS, read_table

HEIF_SUFFIXES = (".heic", ".heif", ".hif")  # read by pillow-heif, if it is installed: `personalize[heic]`
IMAGE_SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", *HEIF_SUFFIXES
)  # fmt: skip
METADATA_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # as in the imagefolder of 🤗 datasets
CAPTION_SUFFIXES = (".txt", ".caption")
MAX_CAPTION_BYTES = 2**20
MAX_PARQUET_BYTES = 4 * 2**30  # it may hold the pictures themselves
MAX_UNPACKED = 16  # times the size of a Parquet file
PARQUET_BATCH = 64  # rows


@dataclass(frozen=True)
class Row:
    """One row of a metadata file: its columns, and where it stands, for messages."""

    where: str
    columns: Mapping[str, Any]


def caption_files(picture: Path) -> list[Path]:
    """The files that may hold the caption of the file `picture`: for 1.png 1.txt, 1.caption, 1.TXT, 1.png.txt, …"""
    suffixes = [*CAPTION_SUFFIXES, *map(str.upper, CAPTION_SUFFIXES)]  # in capitals beside IMG_1.JPG
    names = [picture.with_suffix(suffix) for suffix in suffixes]
    return [*names, *(picture.with_name(picture.name + suffix) for suffix in suffixes)]


def caption_file(picture: Path) -> Path | None:
    """The first file beside `picture` that holds its caption, if there is one."""
    return next((path for path in caption_files(picture) if path.is_file()), None)


def sidecar_caption(picture: Path) -> str | None:
    """The caption in a text file beside the file `picture`, on one line; None if there is no such file.

    Raises:
        UserError: the file is in another encoding than UTF-8, -16 or -32, or it is empty.
    """
    path = caption_file(picture)
    if path is None:
        return None
    caption = " ".join(read_text(path, MAX_CAPTION_BYTES).split())
    if not caption:
        raise UserError(f"the caption from {path} is empty: say what the picture shows, e.g. 'a photo of a dog'")
    return caption


def metadata_file(folder: Path) -> Path | None:
    """The metadata file in `folder`, if there is one; UserError if there are two."""
    files = [folder / name for name in METADATA_NAMES if (folder / name).is_file()]
    if len(files) > 1:
        raise UserError(f"{folder} holds {files[0].name} and {files[1].name}: keep one of them")
    return files[0] if files else None


def read_rows(path: Path) -> list[Row]:
    """The rows of a metadata file, each of which names a picture in the column `file_name`.

    Raises:
        UserError: a row that cannot be read or names no picture; the message names its line.
    """
    rows = list({".jsonl": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}[path.suffix](path))
    for row in rows:
        name = row.columns.get("file_name")
        if not isinstance(name, str) or not name:
            got = f"columns {', '.join(map(str, row.columns)) or 'none'}" if name is None else f"file_name {name!r}"
            raise UserError(f"{row.where}: it has {got}, expected a column file_name with the name of a picture")
    return rows


def _json_rows(path: Path) -> Iterator[Row]:
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        columns = parse_json(line, where, "is no JSON, one object per line was expected")
        if not isinstance(columns, dict):
            raise UserError(f"{where} holds a {type(columns).__name__}, expected an object with file_name")
        yield Row(where, columns)


def _csv_rows(path: Path) -> Iterator[Row]:
    for line, cells in read_table(path)[1]:
        where = f"{path}, line {line}"
        if SURPLUS in cells:
            raise UserError(f"{where} has more cells than the header: put quotes around cells with separators")
        yield Row(where, {name: cell or None for name, cell in cells.items()})


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        with opened(path, MAX_PARQUET_BYTES) as stream:
            left, number = MAX_UNPACKED * os.fstat(stream.fileno()).st_size + MAX_TEXT_BYTES, 0
            for batch in parquet.ParquetFile(stream).iter_batches(PARQUET_BATCH):
                left -= batch.nbytes  # repeated values take next to nothing in the file
                if left < 0 or number > MAX_ROWS:
                    raise UserError(
                        f"{path} unpacks to far more than its own size, or over {MAX_ROWS:,} rows: split it"
                    )
                for row in batch.to_pylist():
                    number += 1
                    yield Row(f"{path}, row {number}", row)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read as Parquet: {str(error).splitlines()[0]}") from None
