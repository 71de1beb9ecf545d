"""Locks on folders: one holder at a time, and a dead one holds nothing."""

import json
import os
import signal
import socket
import time
from pathlib import Path

import pytest

from personalize.io import locks
from personalize.io.locks import Locked, folder_lock
from tests.support.children import start_child

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
NO_PROCESS = 2**22 - 1  # above the ids that Linux gives by default


def test_the_folder_is_made_and_goes_again_if_it_is_empty(tmp_path: Path) -> None:
    with folder_lock(tmp_path / "new" / "deep"):
        about = json.loads((tmp_path / "new" / "deep" / ".training.lock").read_text())
        assert about == {"process": os.getpid(), "host": socket.gethostname()}
    assert not list(tmp_path.iterdir())
    with folder_lock(tmp_path / "new"):
        (tmp_path / "new" / "result").touch()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["result"]


def test_where_an_open_file_cannot_be_removed_the_lock_is_free_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Windows the file stayed, and with it the lock for a day: a second edit waited ten minutes for the first."""

    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(f"{path} is in use")

    monkeypatch.setattr(locks, "fcntl", None)
    monkeypatch.setattr(Path, "unlink", refuse)
    for _ in range(2):
        with folder_lock(tmp_path), pytest.raises(Locked), folder_lock(tmp_path):
            pass


def held(folder: Path) -> None:
    with folder_lock(folder):
        (folder / "held").touch()
        time.sleep(60)


@needs_fork
def test_a_second_holder_is_refused_and_a_killed_one_holds_nothing(tmp_path: Path) -> None:
    child = start_child(lambda: held(tmp_path))
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    pid = child.process  # pyright: ignore[reportFunctionMemberAccess]
    with pytest.raises(Locked, match=f"in use for training by process {pid} on {socket.gethostname()}"):
        with folder_lock(tmp_path):
            pass
    with folder_lock(tmp_path, "writing"):  # another purpose
        pass
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert (tmp_path / ".training.lock").exists()
    with folder_lock(tmp_path):
        pass
    assert not (tmp_path / ".training.lock").exists()


@pytest.mark.parametrize(
    ("about", "age", "stale"),
    [({"process": NO_PROCESS, "host": "here"}, 0, True), ({"process": 1, "host": "here"}, 0, False),
     ({"process": 1, "host": "elsewhere"}, 0, False), ({"process": 1, "host": "elsewhere"}, 90_000, True),
     ({}, 0, True), ({"process": "x"}, 0, True)],
)  # fmt: skip
def test_where_the_disk_has_no_locks_the_file_alone_counts(tmp_path, monkeypatch, about, age, stale) -> None:
    def no_locks(handle: int, kind: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(locks.fcntl, "flock", no_locks)
    monkeypatch.setattr(socket, "gethostname", lambda: "here")
    path = tmp_path / ".training.lock"
    path.write_text(json.dumps(about))
    os.utime(path, (time.time() - age,) * 2)
    if stale:
        with folder_lock(tmp_path):
            pass
    else:
        with pytest.raises(Locked), folder_lock(tmp_path):
            pass


@needs_fork
def test_many_writers_in_turn_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "count"
    path.write_text("0")

    def add() -> None:
        for _ in range(5):
            with folder_lock(tmp_path, "writing", wait=30):
                value = int(path.read_text())
                time.sleep(0.002)
                path.write_text(str(value + 1))

    for child in [start_child(add) for _ in range(8)]:
        child()
    assert path.read_text() == "40"
