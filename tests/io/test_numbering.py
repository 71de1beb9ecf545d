"""Results get names that are not taken."""

from __future__ import annotations

from pathlib import Path

import pytest

from personalize.io.numbering import add_files, next_number, unused_folder, unused_names


def test_files_are_added_and_never_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    assert add_files(folder, {"a.png": b"1", "a.json": b"1"}) == {"a.png": "a.png", "a.json": "a.json"}
    assert add_files(folder, {"a.png": b"2", "b.png": b"2"}) == {"a.png": "a-001.png", "b.png": "b-001.png"}
    assert add_files(folder, {"a.png": b"3"}) == {"a.png": "a-002.png"}
    written = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert written == {"a.png": b"1", "a.json": b"1", "a-001.png": b"2", "b-001.png": b"2", "a-002.png": b"3"}


def test_a_users_own_file_keeps_its_name(tmp_path: Path) -> None:
    (tmp_path / "edited.png").write_bytes(b"mine")
    assert unused_names(tmp_path, ["edited.png", "edit.json"]) == {
        "edited.png": "edited-001.png", "edit.json": "edit-001.json"
    }  # fmt: skip


def test_numbers_go_on(tmp_path: Path) -> None:
    assert next_number(tmp_path / "missing", "edit-") == next_number(tmp_path, "edit-") == 0
    for name in ("edit-000.png", "edit-007.png", "edit-x.png", "edited-099.png", "my-edit-100.png", "edit-9"):
        (tmp_path / name).touch()
    assert next_number(tmp_path, "edit-") == 8


def test_a_folder_with_a_finished_run_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("adapter", "adapter-2"):
        assert unused_folder("adapter", "adapter.json") == Path(name)
        Path(name).mkdir()
        assert unused_folder("adapter", "adapter.json") == Path(name)  # begun and not finished: it is gone on with
        Path(name, "adapter.json").touch()
    assert unused_folder("adapter", "adapter.json") == Path("adapter-3")
