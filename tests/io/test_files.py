"""Files: written completely or not at all whatever fails, and read without trusting their headers."""

import errno
import json
import os
import pickle
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from personalize.errors import UserError
from personalize.io import atomic, tensor_files
from personalize.io.atomic import check_output_folder, plain_name, write_file, write_folder
from personalize.io.tensor_files import read_json, read_tensors, tensor_bytes


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


def tensors():
    return {
        "b": torch.arange(6.0).reshape(2, 3),
        "a": torch.tensor(3.0, dtype=torch.float16),
        "c.bf16": torch.randn(2, 2, 1, 1).bfloat16(),
        "none": torch.empty(0, 4),
        "flags": torch.tensor([True, False]),
    }


def test_tensor_files_round_trip_and_agree_with_the_reference_library(tmp_path):
    from safetensors.torch import load_file, save_file

    content, metadata = tensors(), {"z": "ü", "a": "1"}
    path = write_file(tmp_path / "ours.safetensors", tensor_bytes(content, metadata))
    save_file(content, tmp_path / "theirs.safetensors", metadata)
    for found in (read_tensors(path).tensors, load_file(path), read_tensors(tmp_path / "theirs.safetensors").tensors):
        assert found.keys() == content.keys()
        for key, tensor in content.items():
            assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor)
    assert read_tensors(path).metadata == read_tensors(tmp_path / "theirs.safetensors").metadata == metadata
    assert tensor_bytes(dict(reversed(content.items())), {"a": "1", "z": "ü"}) == path.read_bytes()


def crafted(header, data=b"\0" * 16, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype="F32", shape=(4,), offsets=(0, 16)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


HOSTILE = {
    "empty file": b"",
    "seven bytes": b"1234567",
    "header longer than the file": crafted({"a": entry()}, length=10**6),
    "header of 2**63 bytes": crafted({"a": entry()}, length=2**63),
    "no JSON": crafted(b"{not json}"),
    "not UTF-8": crafted(b'{"\xff": 1}'),
    "a list": crafted([1, 2]),
    "a hundred thousand brackets": crafted(b"[" * 100_000),
    "a number of five thousand digits": crafted(b'{"a": ' + b"9" * 5000 + b"}"),
    "the same name twice": crafted(b'{"a": {"dtype":"F32","shape":[4],"data_offsets":[0,16]},"a":1}'),
    "entry is no object": crafted({"a": 7}),
    "unknown dtype": crafted({"a": entry(dtype="F99")}),
    "dtype is a list": crafted({"a": entry(dtype=["F32"])}),
    "no shape": crafted({"a": {"dtype": "F32", "data_offsets": [0, 16]}}),
    "negative side": crafted({"a": entry(shape=(-4,))}),
    "two negative sides": crafted({"a": entry(shape=(-2, -2))}),
    "fractional side": crafted({"a": entry(shape=(4.0,))}),
    "boolean side": crafted({"a": entry(shape=(True, 4))}),
    "terabytes": crafted({"a": entry(shape=(2**40,))}),
    "overflowing product": crafted({"a": entry(shape=(2**32, 2**32), offsets=(0, 0))}),
    "empty with overflowing strides": crafted({"a": entry(shape=(0, 2**62, 2**62), offsets=(0, 0))}, b""),
    "too many dimensions": crafted({"a": entry(shape=(1,) * 60 + (4,))}),
    "shape against bytes": crafted({"a": entry(shape=(5,))}),
    "beyond the end": crafted({"a": entry(shape=(8,), offsets=(0, 32))}),
    "end before begin": crafted({"a": entry(shape=(0,), offsets=(16, 0))}),
    "negative offset": crafted({"a": entry(offsets=(-16, 0))}),
    "three offsets": crafted({"a": entry(offsets=(0, 16, 16))}),
    "overlap": crafted({"a": entry(), "b": entry()}),
    "gap": crafted({"a": entry(shape=(1,), offsets=(0, 4)), "b": entry(shape=(1,), offsets=(12, 16))}),
    "bytes left over": crafted({"a": entry(shape=(1,), offsets=(0, 4))}),
    "metadata of numbers": crafted({"__metadata__": {"a": 1}, "a": entry()}),
    "metadata of a list": crafted({"__metadata__": [], "a": entry()}),
    "pickle": pickle.dumps({"a": 1}),
    "zip": b"PK\x03\x04" + b"\0" * 100,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers_are_user_errors_of_one_line(tmp_path, name):
    path = tmp_path / "x.safetensors"
    path.write_bytes(HOSTILE[name])
    with pytest.raises(UserError) as caught:
        read_tensors(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_names_are_never_paths(tmp_path):
    path = write_file(tmp_path / "x.safetensors", tensor_bytes({"../../evil": torch.zeros(1), "/etc/x": torch.ones(1)}))
    assert set(read_tensors(path).tensors) == {"../../evil", "/etc/x"}
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_pickles_are_refused_with_the_reason(tmp_path):
    path = tmp_path / "x.bin"
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="pickle, which can run code"):
        read_tensors(path)


@pytest.mark.parametrize("cut", [0, 1, 7, 8, 9, 50, -1])
def test_truncated_files_are_refused(tmp_path, cut):
    whole = tensor_bytes({"a": torch.ones(5)})
    (tmp_path / "x.safetensors").write_bytes(whole[:cut])
    with pytest.raises(UserError):
        read_tensors(tmp_path / "x.safetensors")


def test_missing_and_damaged_json_files_are_refused(tmp_path):
    for reader in (read_json, read_tensors):
        with pytest.raises(UserError, match="does not exist"):
            reader(tmp_path / "none")
        with pytest.raises(UserError, match="is no file"):
            reader(tmp_path)
    for text in (b"", b"[]", b"{", b"\xff", b"[" * 100_000):
        (tmp_path / "x.json").write_bytes(text)
        with pytest.raises(UserError):
            read_json(tmp_path / "x.json")


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
