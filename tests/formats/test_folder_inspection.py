"""A folder of adapter files of all kinds, and of broken and hostile ones, in one table."""

import json
import time
from types import SimpleNamespace

import pytest
import torch

from personalize.cli.commands import inspect
from personalize.errors import UserError
from personalize.formats.folder_inspection import inspect_folder
from personalize.io import tensor_files
from tests.support.adapter_kinds import KINDS

HOSTILE = {
    "empty.safetensors": b"",
    "length.safetensors": (2**63).to_bytes(8, "little") + b"{}",
    "nested.safetensors": (100_000).to_bytes(8, "little") + b'{"a":' * 20_000,
    "names\x1b[31m.safetensors": b"\x00" * 64,
    "pickle.pt": b"\x80\x04cos\nsystem\n(S'echo harm'\ntR.",
    "zip.ckpt": b"PK\x03\x04" + bytes(100),
    "text.safetensors": b"<html>not found</html>",
    "offsets.safetensors": (64).to_bytes(8, "little")
    + b'{"a":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4]}}'[:64].ljust(64) + bytes(4),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """More than 40 entries: every kind, one of them as a folder of PEFT, hostile files, and what is no adapter."""
    place = tmp_path_factory.mktemp("many")
    for number, make in enumerate(KINDS.values()):
        kind = make()
        if kind.beside:
            kind.write(place / f"{number:02} folder")
        else:
            kind.write(place / "one").rename(place / f"{number:02}.safetensors")
            (place / "one").rmdir()
    for name, content in HOSTILE.items():
        (place / name).write_bytes(content)
    for number in range(42 - len(KINDS) - len(HOSTILE)):
        (place / f"copy{number}.safetensors").write_bytes((place / "01.safetensors").read_bytes())
    (place / "notes.txt").write_text("no adapter")
    (place / "pictures").mkdir()
    return place


def test_every_file_has_one_line_and_hostile_ones_cost_no_more(folder, capsys):
    begun = time.process_time()
    rows = inspect.run(SimpleNamespace(file=folder, json=False, picture=None, allow_pickle=False))
    assert time.process_time() - begun < 10
    said = capsys.readouterr().out
    assert len(rows) == 42 and len(said.splitlines()) == 43, "a heading and one line each"
    assert "\x1b" not in said and "notes.txt" not in said
    by_name = {row.file: row for row in rows}
    assert all(not by_name[name].readers for name in HOSTILE), "none of them is readable"
    kinds = [row for row in rows if row.readers]
    assert len(kinds) == 42 - len(HOSTILE)
    assert [row.what for row in kinds if row.readers["personalize"] == "no"] == ["Custom Diffusion in no prefix names"]
    assert by_name["04 folder"].modules == 8 and by_name["04 folder"].ranks == "4"
    assert by_name["22.safetensors"].tokens == ("mycat",) and by_name["22.safetensors"].family == "sdxl"


def test_only_headers_and_alphas_are_read(folder, monkeypatch):
    read = []
    real = tensor_files._read_tensor
    monkeypatch.setattr(tensor_files, "_read_tensor", lambda *a: read.append(a[3]) or real(*a))
    inspect_folder(folder)
    numbers = [torch.Size(shape).numel() for shape in read]
    assert numbers and max(numbers) <= 16


def test_json_has_the_same_lines(folder, capsys):
    inspect.run(SimpleNamespace(file=folder, json=True, picture=None, allow_pickle=False))
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 42 and {"file", "what", "family", "readers", "problems"} <= rows[0].keys()


def test_a_folder_without_adapters_and_a_picture_of_many_are_refused(tmp_path, folder):
    with pytest.raises(UserError, match="holds no file that could be an adapter"):
        inspect_folder(tmp_path)
    with pytest.raises(UserError, match="--picture draws one file"):
        inspect.run(SimpleNamespace(file=folder, json=False, picture=tmp_path / "x.png", allow_pickle=False))


def test_a_file_that_cannot_be_opened_has_its_line_among_the_others(tmp_path, monkeypatch):
    """One file without the right to read it hid all the others."""
    for name in ("mine.safetensors", "theirs.safetensors"):
        KINDS["LoRA, kohya's names"]().write(tmp_path / "one").rename(tmp_path / name)
        (tmp_path / "one").rmdir()

    def refuse(path):
        if path.name == "theirs.safetensors":
            raise UserError(f"could not read {path}: Permission denied")
        return False

    monkeypatch.setattr("personalize.formats.folder_inspection.is_pickle", refuse)
    mine, theirs = inspect_folder(tmp_path)
    assert mine.readers["personalize"] == "yes" and theirs.what.startswith("cannot be read: could not read")
