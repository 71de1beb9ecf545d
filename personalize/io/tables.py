"""Tables in CSV files, read with limits on their size, columns and rows."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

from personalize.errors import UserError
from personalize.io.plain_files import read_text

MAX_ROWS = 100_000
MAX_COLUMNS = 1000  # every row becomes a dictionary of all columns
SURPLUS = ""  # the key of cells beyond the header's columns
MORE = "the row has more cells than the header has columns: put quotes around cells with commas"


def read_table(
    path: str | Path, *, skip_spaces: bool = False
) -> tuple[list[str], Iterator[tuple[int, dict[str, str | list[str] | None]]]]:
    """The columns of a UTF-8 CSV file, and its rows as they are asked for: the line number, and the cells by column.

    Cells that a row lacks are None; those that it has too many are a list under `SURPLUS`.  `skip_spaces`: spaces
    after a comma do not count.

    Raises:
        UserError: as `read_text`; no CSV, a column twice, more than `MAX_COLUMNS` columns or, when it comes to it,
            `MAX_ROWS` rows.
    """
    reader = csv.DictReader(StringIO(read_text(path), newline=""), restkey=SURPLUS, skipinitialspace=skip_spaces)
    try:
        columns = list(reader.fieldnames or ())
    except csv.Error as error:
        raise UserError(f"{path}, line 1 is no CSV: {error}") from None
    if len(columns) > MAX_COLUMNS:
        raise UserError(f"{path} has {len(columns):,} columns, at most {MAX_COLUMNS:,} were expected: is it a table?")
    if twice := next((name for name in columns if name and columns.count(name) > 1), None):
        raise UserError(f"{path} has the column {twice!r} twice: only one can count, rename or remove the other")
    return columns, _rows(reader, path)


def _rows(reader: csv.DictReader, path: str | Path) -> Iterator[tuple[int, dict[str, str | list[str] | None]]]:
    try:
        for number, cells in enumerate(reader, 1):
            if number > MAX_ROWS:
                raise UserError(f"{path} has more than {MAX_ROWS:,} rows: split the table")
            yield reader.line_num, cells  # pyright: ignore[reportReturnType]
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num} is no CSV: {error}") from None
