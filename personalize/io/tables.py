"""Tables in CSV files, as programs and spreadsheets write them, read with limits on their size, columns and rows."""

from __future__ import annotations

import csv
import os
import re
import unicodedata
from collections.abc import Iterator, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from personalize.errors import UserError
from personalize.io.plain_files import at_home, read_text

MAX_ROWS = 100_000
MAX_COLUMNS = 1000  # every row becomes a dictionary of all columns
SURPLUS = "\0"  # the key of cells beyond the header's columns: no text holds it
MORE = "the row has more cells than the header has columns: put quotes around cells with separators"
SEPARATORS = (",", ";", "\t")  # a semicolon where the comma is the decimal point, a tab in Excel's "Unicode text"
EXCEL = re.compile(r'"?sep=(.)"?')  # a first line by which Excel is told the separator

Cells = dict[str, str | list[str] | None]


def place_of(name: str, folder: Path) -> Path:
    """The file or folder that a cell of a table in `folder` means: `~/` is the home folder, all else is in `folder`.

    If nothing is there, a "\\" separates folders, as on Windows, and accents may be composed otherwise, as on macOS.  A
    name that begins with "~" in another way, such as `~$a.png`, is a name like others.
    """
    spelled = [name, *(unicodedata.normalize(form, name.replace("\\", "/")) for form in ("NFC", "NFD"))]
    paths = [folder / at_home(one) for one in spelled]
    return next(filter(os.path.lexists, paths), paths[0])


def read_table(path: str | Path) -> tuple[list[str], Iterator[tuple[int, Cells]]]:
    """The columns of a CSV file, and its rows as they are asked for: the line number, and the cells by column.

    The header tells which of `SEPARATORS` stands between cells; spaces after it do not count, and neither do columns
    at the end that have no name and no cell, which spreadsheets write, nor a nameless first one, which
    numbers the rows.  Cells that a row lacks are None; those that it has too many, empty ones too, are a list under
    `SURPLUS`.

    Raises:
        UserError: as `read_text`; no CSV, a column twice, more than `MAX_COLUMNS` columns or, when it comes to it,
            `MAX_ROWS` rows.
    """
    text = read_text(path)
    line = re.split(r"[\r\n]", text, maxsplit=1)[0]
    stated = EXCEL.fullmatch(line)
    separator = stated[1] if stated else next((one for one in SEPARATORS if one in line), SEPARATORS[0])
    reader = csv.reader(StringIO(text, newline=""), delimiter=separator, skipinitialspace=True)
    try:
        if stated:
            next(reader)
        header = [name.strip() for name in next(reader, [])]
    except csv.Error as error:
        raise UserError(f"{path}, line 1 is no CSV: {error}") from None
    end = max((place for place, name in enumerate(header, 1) if name), default=0)
    named = slice(1 if end and not header[0] else 0, end)  # a nameless first one has pandas' numbers of the rows
    columns = header[named]
    if len(columns) > MAX_COLUMNS:
        raise UserError(f"{path} has {len(columns):,} columns, at most {MAX_COLUMNS:,} were expected: is it a table?")
    if twice := next((name for name in columns if name and columns.count(name) > 1), None):
        raise UserError(f"{path} has the column {twice!r} twice: only one can count, rename or remove the other")
    return columns, _rows(reader, header, named, path)


def _rows(reader: Any, header: Sequence[str], named: slice, path: str | Path) -> Iterator[tuple[int, Cells]]:
    columns, nameless = header[named], len(header) - named.stop
    try:
        for number, row in enumerate(filter(None, reader), 1):
            if number > MAX_ROWS:
                raise UserError(f"{path} has more than {MAX_ROWS:,} rows: split the table")
            cells: Cells = dict.fromkeys(columns) | dict(zip(columns, row[named], strict=False))
            more = row[named.stop :]
            if len(more) > nameless or any(map(str.strip, more)):
                cells[SURPLUS] = more
            yield reader.line_num, cells
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num} is no CSV: {error}") from None
