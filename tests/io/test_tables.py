"""Tables as spreadsheets of different countries and programs write them."""

from __future__ import annotations

from pathlib import Path

import pytest

from personalize.io.tables import SURPLUS, place_of, read_table

ROW = {"file": "a.png", "source": "a cat, asleep", "target": 'a "dog"'}
TABLES = {
    "RFC 4180": b'file,source,target\r\na.png,"a cat, asleep","a ""dog"""\r\n',
    "Excel with decimal commas": b'\xef\xbb\xbffile;source;target\r\na.png;a cat, asleep;"a ""dog"""\r\n',
    "Excel's Unicode text": 'file\tsource\ttarget\r\na.png\t"a cat, asleep"\t"a ""dog"""\r\n'.encode("utf-16"),
    "Excel, told the separator": b'sep=;\r\nfile;source;target\r\na.png;a cat, asleep;"a ""dog"""\r\n',
    "empty columns at the end": b'file,source,target,,\na.png,"a cat, asleep","a ""dog""",,\n,,,,\n',
    "typed, with spaces": b'file , source, target\na.png, "a cat, asleep", "a ""dog"""\n',
    "an old Mac's": b'file;source;target\ra.png;a cat, asleep;"a ""dog"""\r',
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_of_any_spreadsheet_is_read(tmp_path: Path, name: str) -> None:
    """A semicolon or a tab made one column of all, and an empty column was an unknown one."""
    path = tmp_path / "x.csv"
    path.write_bytes(TABLES[name])
    columns, rows = read_table(path)
    assert columns == list(ROW)
    assert [cells for _, cells in rows if any(cells.values())] == [ROW]


def test_the_numbers_that_pandas_writes_before_each_row_are_no_column(tmp_path: Path) -> None:
    """`to_csv` gives them a column without a name: every row had too many cells then."""
    path = tmp_path / "x.csv"
    path.write_text(",a,b\n0,1,2\n1,,4\n")
    columns, rows = read_table(path)
    assert columns == ["a", "b"]
    assert [cells for _, cells in rows] == [{"a": "1", "b": "2"}, {"a": "", "b": "4"}]


def test_cells_that_lack_or_are_too_many_are_told(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("a,b\n1\n\n1,2,\n")  # an empty one too: a comma within a cell moves all that follow
    assert list(read_table(path)[1]) == [(2, {"a": "1", "b": None}), (4, {"a": "1", "b": "2", SURPLUS: [""]})]
    path.write_text("a,b,\n1,2,3\n")
    assert list(read_table(path)[1]) == [(2, {"a": "1", "b": "2", SURPLUS: ["3"]})]


def test_files_are_found_as_other_systems_spell_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows' separators, accents as one character or two, and names like those of Office's own files."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    for name in ("home/h.png", "table/sub/a.png", "table/caf\u00e9.png", "table/nin\u0303o.png", "table/~$a.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    table = tmp_path / "table"
    spelled = {
        "~/h.png": tmp_path / "home" / "h.png", "sub\\a.png": table / "sub" / "a.png", "~$a.png": table / "~$a.png",
        "cafe\u0301.png": table / "caf\u00e9.png", "ni\u00f1o.png": table / "nin\u0303o.png",
        "sub/none.png": table / "sub" / "none.png", "sub\\none.png": table / "sub\\none.png",
    }  # fmt: skip
    for name, path in spelled.items():
        found = place_of(name, table)
        assert found == path or (path.exists() and found.samefile(path))
