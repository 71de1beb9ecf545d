"""Files and folders: written completely or not at all, whatever fails."""

import errno
import os
import threading
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from personalize.errors import UserError
from personalize.io import atomic, tensor_files
from personalize.io.atomic import plain_name, write_file, write_folder
from personalize.io.tensor_files import read_tensors, tensor_bytes


class FullDisk:
    """Replaces `atomic.create_file` by one on a disk that has room for `room` more bytes, over all files."""

    def __init__(self, room):
        self.room = room

    def __call__(self, path):
        stream = open(path, "xb")
        write = stream.write

        class Stream:
            def __enter__(self):
                return self

            def __exit__(self, *_):
                stream.close()

            def write(_, data):  # noqa: N805
                write(data[: self.room])
                self.room -= len(data)
                if self.room < 0:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            def flush(self):
                stream.flush()

            def fileno(self):
                return stream.fileno()

        return Stream()


def snapshot(folder):
    """Every path below `folder` and the bytes of every file."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def test_a_file_is_replaced_completely_or_not_at_all(tmp_path, monkeypatch):
    target, new = tmp_path / "f.bin", bytes(range(256)) * 4
    target.write_bytes(b"old")
    for room in range(0, len(new), 17):  # 61 positions
        monkeypatch.setattr(atomic, "create_file", FullDisk(room))
        with pytest.raises(UserError, match="No space left"):
            write_file(target, new)
        assert snapshot(tmp_path) == {"f.bin": b"old"}
    monkeypatch.setattr(atomic, "create_file", FullDisk(len(new)))
    write_file(target, new)
    assert snapshot(tmp_path) == {"f.bin": new}


@pytest.mark.parametrize("before", [False, True])
def test_a_folder_is_written_completely_or_not_at_all(tmp_path, monkeypatch, before):
    target, new = tmp_path / "adapter", {"a": b"x" * 300, "b": b"y" * 300}
    if before:
        write_folder(target, {"a": b"old", "gone": b"old"})
        (target / "logs").mkdir()
        (target / "logs" / "events").write_bytes(b"kept")
    old = snapshot(tmp_path)
    for room in range(0, 600, 11):  # 55 positions
        monkeypatch.setattr(atomic, "create_file", FullDisk(room))
        with pytest.raises(UserError, match="No space left"):
            write_folder(target, new, remove=["gone"] if before else [])
        assert snapshot(tmp_path) == old
    monkeypatch.setattr(atomic, "create_file", FullDisk(700))  # and the list of what is removed
    write_folder(target, new, remove=["gone"] if before else [])
    kept = {"logs": None, "logs/events": b"kept"} if before else {}
    assert snapshot(target) == new | kept
    assert [entry.name for entry in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize(
    ("call", "number"), [("fsync", 2), ("rename", 1), ("replace", 1), ("replace", 2), ("replace", 3), ("unlink", 1)]
)
def test_disk_errors_leave_the_old_folder(tmp_path, monkeypatch, call, number):
    """Also when some of the new files have their names already."""
    target = write_folder(tmp_path / "adapter", {"a": b"old", "z": b"old", "gone": b"old"})
    place = Path if call == "unlink" else os
    real, calls = getattr(place, call), []

    def failing(*args, **options):
        calls.append(args)
        if len(calls) == number:
            raise OSError(errno.EIO, "Input/output error")
        return real(*args, **options)

    before = snapshot(tmp_path)
    monkeypatch.setattr(place, call, failing)
    with pytest.raises(UserError, match="Input/output error"):
        write_folder(target, {"a": b"new", "b": b"new", "z": b"new"}, remove=["gone"])
    assert snapshot(tmp_path) == before


def test_a_save_moves_and_removes_no_file_of_another_program(tmp_path):
    """Another program writes into the folder during every save, in place and by renaming, also into a folder inside."""
    target, written, stop = write_folder(tmp_path / "adapter", {"a": b"0"}), [], threading.Event()

    def others():
        (target / "logs").mkdir()
        while not stop.is_set():
            name = f"logs/{len(written)}" if len(written) % 2 else f"other-{len(written)}"
            (target / f"{name}.tmp").write_bytes(b"theirs")
            (target / f"{name}.tmp").rename(target / name)
            written.append(name)

    thread = threading.Thread(target=others)
    inode = target.stat().st_ino
    thread.start()
    try:
        for number in range(20):
            write_folder(target, {"a": b"%d" % number, "b": b"x" * 1000}, remove=["gone"])
    finally:
        stop.set()
        thread.join()
    assert len(written) > 20 and target.stat().st_ino == inode, "a mount point is written into"
    assert snapshot(target) == {name: b"theirs" for name in written} | {"a": b"19", "b": b"x" * 1000, "logs": None}


def test_a_folder_that_appears_while_it_is_written_is_written_into(tmp_path):
    target = tmp_path / "adapter"

    def check(folder):
        target.mkdir()
        (target / "theirs").write_bytes(b"1")

    write_folder(target, {"a": b"1"}, check=check)
    assert snapshot(tmp_path) == {"adapter": None, "adapter/a": b"1", "adapter/theirs": b"1"}


@pytest.mark.parametrize("name", ["n" * 250, "名" * 80])
def test_names_as_long_as_the_file_system_takes(tmp_path, name):
    for content in (b"1", b"2"):
        write_folder(tmp_path / name, {name: content})
        write_file(tmp_path / name / name, content)
    assert snapshot(tmp_path) == {name: None, f"{name}/{name}": b"2"}


def test_a_failed_check_and_an_interruption_leave_the_old_folder(tmp_path):
    target = write_folder(tmp_path / "adapter", {"a": b"old"})
    for error in (UserError("wrong"), KeyboardInterrupt()):

        def check(folder, error=error):
            assert (folder / "a").read_bytes() == b"new"
            raise error

        with pytest.raises(type(error)):
            write_folder(target, {"a": b"new"}, check=check)
        assert snapshot(tmp_path) == {"adapter": None, "adapter/a": b"old"}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_save_leaves_the_old_folder_or_the_new_one(tmp_path):
    target = write_folder(tmp_path / "adapter", {"a": b"old" * 10_000})
    for moment in range(5):
        child = os.fork()
        if child == 0:
            with suppress(BaseException):

                def check(folder, moment=moment):
                    if moment < 2:
                        os.kill(os.getpid(), 9)

                write_folder(target, {"a": b"new" * 10_000, "b": bytes([moment])}, check=check)
            os.kill(os.getpid(), 9)
        os.waitpid(child, 0)
        atomic.remove_stale(target)
        found = snapshot(target)
        assert found == ({"a": b"old" * 10_000} if moment < 2 else {"a": b"new" * 10_000, "b": bytes([moment])})


def test_paths_that_cannot_be_replaced_are_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match="is a file"):
        write_folder(tmp_path / "file", {"a": b""})
    (tmp_path / "old" / "a").mkdir(parents=True)
    with pytest.raises(UserError, match="a is a folder, a file was expected"):
        write_folder(tmp_path / "old", {"a": b""})
    (tmp_path / "old" / "a").rmdir()
    (tmp_path / "old").rmdir()
    with pytest.raises(UserError, match="cannot be a folder: embedded null"):
        write_folder("a\0b", {"a": b""})
    with pytest.raises(UserError, match="no plain file name"):
        write_folder(tmp_path / "x", {"../a": b""})
    assert snapshot(tmp_path) == {"file": b""}
    monkeypatch.chdir(tmp_path)
    write_folder(".", {"a": b"1"})  # the folder this program runs in
    assert snapshot(tmp_path) == {"file": b"", "a": b"1"}


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\\b", "a\0b", "c:d"])
def test_names_that_are_no_plain_file_names_are_refused(name):
    with pytest.raises(UserError):
        plain_name(name)


def test_a_file_in_parts_is_checked_before_it_takes_its_name(tmp_path):
    tensors = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.arange(3)}
    path = write_file(tmp_path / "t", tensor_files.tensor_parts(tensors, {"k": "v"}))
    assert path.read_bytes() == tensor_bytes(tensors, {"k": "v"})
    write_file(
        path, tensor_files.tensor_parts(tensors, dtype=torch.float16), check=lambda new: read_tensors(new).tensors["b"]
    )
    found = read_tensors(path).tensors
    assert found["b"].dtype == torch.float16 and found["a"].dtype == torch.int64
    before = path.read_bytes()

    def interrupted():
        yield b"half"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_file(path, interrupted())
    with pytest.raises(ZeroDivisionError):
        write_file(path, b"new", check=lambda new: 1 / 0)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_folder_may_hold_folders_but_nothing_outside_itself(tmp_path):
    write_folder(tmp_path / "model", {"unet/config.json": b"{}", "index.json": b"{}"})
    assert (tmp_path / "model" / "unet" / "config.json").read_bytes() == b"{}"
    for name in ("../x", "a//b", "/x", "a/../../x", "a/"):
        with pytest.raises(UserError, match="no plain file name"):
            write_folder(tmp_path / "other", {name: b""})
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
