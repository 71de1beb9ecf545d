"""Pickles, where they are allowed, are read for their tensors alone, and take no more memory than they hold."""

import os
import pickle

import pytest
import torch

from personalize.errors import UserError
from personalize.io.pickles import read_any
from tests.support.children import in_child

MEMORY = 64  # MiB


class Calls:
    """Pickled as a call of `function` with `arguments`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def nested(levels, width):
    inner = {"a": torch.ones(1)}
    for _ in range(levels):
        inner = {str(number): inner for number in range(width)}
    return inner


HOSTILE = {
    "expanded from one number": lambda: torch.ones(1).expand(30_000, 30_000),
    "many views of one storage": lambda: dict.fromkeys(map(str, range(3000)), torch.ones(2**18)),
    "dictionaries in one another": lambda: nested(7, 10),
    "dictionaries without tensors": lambda: {"a": torch.ones(1), "b": nested(7, 12)},
    "bytes by their number": lambda: {"a": torch.ones(1), "b": Calls(bytearray, 2**32)},
    "lists without end": lambda: {"a": torch.ones(1), "b": [[] for _ in range(900_000)]},
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("zipped", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_pickle_is_refused_without_filling_the_memory(name, zipped, tmp_path):
    path = tmp_path / "x.pt"
    torch.save(HOSTILE[name](), path, _use_new_zipfile_serialization=zipped)

    def attempt():
        with pytest.raises(UserError, match="no pickle of plain tensors"):
            read_any(path, allow_pickle=True)

    _, grown = in_child(attempt, seconds=100)
    assert grown < MEMORY


@pytest.mark.parametrize("zipped", [True, False])
def test_what_older_programs_saved_is_read(zipped, tmp_path):
    rows = torch.randn(2, 8)
    saved = {
        "string_to_param": {"*": torch.nn.Parameter(rows)},
        "string_to_token": {"*": 265},
        "name": "cat",
        "step": 3,
    }
    tied = {"a": rows, "b": rows, "c": rows.T}
    torch.save(saved, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    torch.save(tied, tmp_path / "b.bin", _use_new_zipfile_serialization=zipped)
    content = read_any(tmp_path / "a.pt", allow_pickle=True)
    assert content.metadata == {"name": "cat"} and torch.equal(content.tensors["string_to_param.*"], rows)
    assert torch.equal(read_any(tmp_path / "b.bin", allow_pickle=True).tensors["c"], rows.T)


def test_plain_pickles_are_refused(tmp_path):
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(UserError, match="no pickle of plain tensors"):
        read_any(tmp_path / "x.pkl", allow_pickle=True)


def test_a_tensor_that_cannot_be_read_is_not_passed_over(tmp_path):
    """A file was read without its sparse tensors, and nothing said so."""
    torch.save({"a": torch.ones(2), "b": torch.eye(3).to_sparse()}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="its tensor 'b' is sparse, quantized or without numbers"):
        read_any(tmp_path / "x.pt", allow_pickle=True)
