"""Results get names that are not taken."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from threading import Barrier, BrokenBarrierError, Thread
from typing import Any

import pytest

from personalize.io import numbering
from personalize.io.numbering import add_files, add_numbered, next_number, unused_folder, unused_names


def test_files_are_added_and_never_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    assert add_files(folder, {"a.png": b"1", "a.json": b"1"}) == {"a.png": "a.png", "a.json": "a.json"}
    assert add_files(folder, {"a.png": b"2", "b.png": b"2"}) == {"a.png": "a-001.png", "b.png": "b-001.png"}
    assert add_files(folder, {"a.png": b"3"}) == {"a.png": "a-002.png"}
    written = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert written == {"a.png": b"1", "a.json": b"1", "a-001.png": b"2", "b-001.png": b"2", "a-002.png": b"3"}


def test_processes_that_finish_at_once_replace_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two edits into one folder that ended together chose the same names, and the second replaced the first's files."""
    folder, both, threads = tmp_path / "out", Barrier(2), []

    def unused(*given: Any) -> dict[str, str]:
        with suppress(BrokenBarrierError):  # both have chosen their names, or the other one waits for us
            both.wait(0.5)
        return unused_names(*given)

    def make(first: int) -> dict[str, bytes]:
        return {f"edit-{first:03d}.png": b"%d" % first, "grid.png": b"grid %d" % first}

    monkeypatch.setattr(numbering, "unused_names", unused)
    written: list[dict[str, str]] = []
    for add in (lambda: add_files(folder, {"edited.png": b"x"}), lambda: add_numbered(folder, "edit-", make)):
        threads += [Thread(target=lambda add=add: written.append(add())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        "edited.png": b"x", "edited-001.png": b"x", "edit-000.png": b"0", "edit-001.png": b"1", "grid.png": b"grid 0",
        "grid-001.png": b"grid 1",
    }  # fmt: skip
    assert len(written) == 4


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
