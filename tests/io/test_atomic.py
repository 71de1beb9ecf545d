"""Files and folders: written completely or not at all, whatever fails."""

import errno
import os
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from personalize.errors import UserError
from personalize.io import atomic, tensor_files
from personalize.io.atomic import check_output_folder, plain_name, write_file, write_folder
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
@pytest.mark.parametrize("exchange", [False, True])
def test_a_folder_is_replaced_completely_or_not_at_all(tmp_path, monkeypatch, before, exchange):
    if not exchange:
        monkeypatch.setattr(atomic, "_swap_folders", lambda first, second: False)
    target, new = tmp_path / "adapter", {"a": b"x" * 300, "b": b"y" * 300}
    if before:
        write_folder(target, {"a": b"old", "gone": b"old"})
        (target / "logs").mkdir()
        (target / "logs" / "events").write_bytes(b"kept")
    old = snapshot(tmp_path)
    for room in range(0, 600, 11):  # 55 positions
        monkeypatch.setattr(atomic, "create_file", FullDisk(room))
        with pytest.raises(UserError, match="No space left"):
            write_folder(target, new, keep=["logs"] if before else [])
        assert snapshot(tmp_path) == old
    monkeypatch.setattr(atomic, "create_file", FullDisk(600))
    write_folder(target, new, keep=["logs"] if before else [])
    kept = {"logs": None, "logs/events": b"kept"} if before else {}
    assert snapshot(target) == new | kept
    assert [entry.name for entry in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_disk_errors_leave_the_old_folder(tmp_path, monkeypatch, call):
    target = write_folder(tmp_path / "adapter", {"a": b"old"})
    monkeypatch.setattr(atomic, "_swap_folders", lambda first, second: False)
    real, calls = getattr(os, call), []

    def failing(*args):
        calls.append(args)
        if len(calls) == 2:  # for `rename`: the old folder has been moved aside, the new one not yet put in place
            raise OSError(errno.EIO, "Input/output error")
        return real(*args)

    monkeypatch.setattr(os, call, failing)
    with pytest.raises(UserError, match="Input/output error"):
        write_folder(target, {"a": b"new", "b": b"new"})
    assert snapshot(tmp_path) == {"adapter": None, "adapter/a": b"old"}


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
        found = snapshot(target)
        assert found == ({"a": b"old" * 10_000} if moment < 2 else {"a": b"new" * 10_000, "b": bytes([moment])})


def test_paths_that_cannot_be_replaced_are_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match="is a file"):
        write_folder(tmp_path / "file", {"a": b""})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="where this program runs"):
        write_folder(".", {"a": b""})
    with pytest.raises(UserError, match="no plain file name"):
        write_folder(tmp_path / "x", {"../a": b""})
    assert snapshot(tmp_path) == {"file": b""}


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


def test_an_output_folder_is_tried_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    refused = {".": "where this program runs", "file": "is a file", "file/x": "is a file", "/proc/nope/x": "not write"}
    for place, says in refused.items():
        with pytest.raises(UserError, match=says):
            check_output_folder(place)
    for place in ("new", "new/deep/er"):
        check_output_folder(place)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    (tmp_path / "old" / "kept").mkdir(parents=True)
    check_output_folder("old")
    assert [path.name for path in (tmp_path / "old").iterdir()] == ["kept"]
