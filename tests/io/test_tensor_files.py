"""Safetensors and JSON files: hostile headers, truncated files and pickles are refused in one line."""

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file

from personalize.errors import UserError
from personalize.io.atomic import write_file
from personalize.io.json_files import read_json
from personalize.io.pickles import read_any
from personalize.io.tensor_files import read_tensors, tensor_bytes


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
    if cut == -1:
        with pytest.raises(UserError, match="is cut short: it has 19 bytes of data, tensor 'a' ends at 20"):
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


FAILED_DOWNLOADS = {
    "is empty": b"",
    "is a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n",
    "is a text that begins 'Entry not found'": b"Entry not found\n",
    "is a text that begins '<html>": b"<html><body>Please sign in</body></html>",
}


@pytest.mark.parametrize("says", FAILED_DOWNLOADS)
@pytest.mark.parametrize("name", ["x.safetensors", "x.bin"])
def test_what_a_failed_download_left_is_called_neither_truncated_nor_a_pickle(tmp_path, name, says):
    (tmp_path / name).write_bytes(FAILED_DOWNLOADS[says])
    for allow in (False, True):
        with pytest.raises(UserError, match=rf"{name} {says}"):
            read_any(tmp_path / name, allow_pickle=allow)


def test_a_header_without_metadata_is_read_as_safetensors_itself_reads_it(tmp_path):
    header = b'{"__metadata__":null,"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    assert load_file(tmp_path / "x.safetensors")["a"] == 0
    content = read_tensors(tmp_path / "x.safetensors")
    assert content.metadata == {} and content.tensors["a"] == 0


@pytest.mark.parametrize("kind", ["F8_E4M3FNUZ", "F4", "C128"])
def test_a_type_of_numbers_that_is_not_known_is_named_and_not_called_damage(tmp_path, kind):
    header = json.dumps({"a": {"dtype": kind, "shape": [4], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(UserError, match=f"tensor 'a' is of the type '{kind}', which is not read"):
        read_tensors(tmp_path / "x.safetensors")
