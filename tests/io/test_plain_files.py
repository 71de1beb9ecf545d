"""Pipes, devices and endless files are refused by every reader, in one line, without waiting and without memory."""

import os
from hashlib import sha256
from pathlib import Path

import pytest
import torch

from personalize.adapters.adapter import Adapter
from personalize.cli.commands import edit_table
from personalize.cli.edit_options import EditConfig
from personalize.cli.parser import read_yaml
from personalize.errors import UserError
from personalize.evaluation.benchmarks import read_edit_list
from personalize.formats.adapter_source import open_adapter
from personalize.formats.inspection import inspect_file
from personalize.formats.verification import verify_file
from personalize.io.image_files import check_image, load_image
from personalize.io.image_metadata import read_rows, sidecar_caption
from personalize.io.json_files import read_json
from personalize.io.pickles import read_any
from personalize.io.plain_files import at_home, file_hash, opened, read_bytes, read_text
from personalize.io.tables import read_table
from personalize.io.tensor_files import read_tensors
from personalize.io.yaml_files import read_options
from personalize.models import loading
from personalize.models.quiet import quiet_loading
from personalize.sampling.trajectory import Trajectory
from personalize.training import checkpoints
from personalize.training.catalogue_table import read_items
from personalize.training.config import SingleImageConfig
from tests.support.children import in_child

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes with names")
MEMORY = 48  # MiB: an endless file would take all there is
READERS = {
    "picture": ("x.png", load_image), "header of a picture": ("x.png", check_image),
    "safetensors": ("x.safetensors", read_tensors), "pickle": ("x.pt", lambda path: read_any(path, allow_pickle=True)),
    "JSON": ("x.json", read_json), "YAML": ("x.yaml", read_options), "CSV": ("x.csv", read_table),
    "options": ("x.yaml", lambda path: read_yaml(path, EditConfig)),
    "metadata.jsonl": ("metadata.jsonl", read_rows), "metadata.csv": ("metadata.csv", read_rows),
    "metadata.parquet": ("metadata.parquet", read_rows),
    "catalogue": ("x.csv", lambda path: read_items(path, SingleImageConfig())),
    "table of edits": ("x.csv", edit_table.read_rows), "benchmark": ("x.json", read_edit_list),
    "hash": ("x.png", file_hash), "text": ("x.txt", read_text), "bytes": ("x.txt", read_bytes),
    "adapter": ("x.safetensors", Adapter.load), "adapter of others": ("x.safetensors", open_adapter),
    "inspected": ("x.safetensors", inspect_file), "verified": ("x.safetensors", verify_file),
    "base": ("x.safetensors", lambda path: loading.load_pipeline(path, torch.float32)),
    "caption": ("x.txt", lambda path: sidecar_caption(path.with_suffix(".png")) or refuse("no caption")),
}  # fmt: skip
FOLDERS = {
    "base": ("model_index.json", lambda folder: loading.load_pipeline(folder, torch.float32)),
    "part of a base": ("unet/config.json", lambda folder: loading.load_pipeline(indexed(folder), torch.float32)),
    "adapter": ("adapter.json", Adapter.load), "checkpoint": ("state.json", checkpoints.load),
    "trajectory": ("trajectory.json", Trajectory.load), "PEFT": ("adapter_config.json", open_adapter),
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def imported_once():
    """Libraries that loading a base imports, so that the forks neither wait for them nor count them."""
    with quiet_loading():
        pass


def refuse(reason):
    raise UserError(reason)


def indexed(folder):
    (folder / "model_index.json").write_text('{"unet": 1, "vae": 1, "text_encoder": 1, "tokenizer": 1, "scheduler": 1}')
    return folder


def refused(reader, path):
    """How much memory a child took to refuse the path; fails if it reads it, waits, or raises anything else."""

    def attempt():
        with pytest.raises(UserError) as caught:
            reader(path)
        return str(caught.value)

    message, grown = in_child(attempt, seconds=20)
    assert "\n" not in message and grown < MEMORY
    return message


@pytest.mark.parametrize("name", READERS)
def test_no_reader_waits_for_a_pipe_or_reads_a_device(name, tmp_path):
    file, reader = READERS[name]
    os.mkfifo(tmp_path / file)
    refused(reader, tmp_path / file)
    (tmp_path / file).unlink()
    (tmp_path / file).symlink_to("/dev/zero")
    refused(reader, tmp_path / file)


@pytest.mark.parametrize("name", FOLDERS)
def test_no_reader_of_a_folder_waits_for_a_pipe_in_it(name, tmp_path):
    file, reader = FOLDERS[name]
    (tmp_path / file).parent.mkdir(exist_ok=True)
    os.mkfifo(tmp_path / file)
    refused(reader, tmp_path)


@pytest.mark.parametrize("name", [name for name in READERS if name not in ("hash", "pickle")])
def test_a_file_of_terabytes_is_not_read_into_the_memory(name, tmp_path):
    file, reader = READERS[name]
    with open(tmp_path / file, "wb") as stream:
        stream.truncate(2**41)  # sparse: it takes no room on the disk
    refused(reader, tmp_path / file)


def test_a_file_may_not_be_exchanged_for_a_pipe_after_it_was_looked_at(tmp_path, monkeypatch):
    (tmp_path / "x").write_text("a")
    regular = os.stat(tmp_path / "x")
    (tmp_path / "x").unlink()
    os.mkfifo(tmp_path / "x")
    monkeypatch.setattr(os, "stat", lambda *args, **kwargs: regular)
    with pytest.raises(UserError, match="a pipe or a device"), opened(tmp_path / "x"):
        pass


def test_plain_files_are_read_whole(tmp_path):
    path = tmp_path / "x.txt"
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32"):
        path.write_text("ü\n", encoding=encoding)
        assert read_text(path) == "ü\n"
    path.write_bytes(b"a" * 3_000_000)
    assert file_hash(path) == sha256(path.read_bytes()).hexdigest()  # in several parts
    assert read_bytes(path) == path.read_bytes()
    with pytest.raises(UserError, match="at most 100 were expected"):
        read_bytes(path, 100)


def test_a_tilde_is_the_home_folder_or_a_part_of_the_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A file called ~backup.png ended a whole catalogue, and `--config ~x.yaml` in a traceback."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert at_home("~/a.png") == tmp_path / "a.png" and at_home(Path("b.png")) == Path("b.png")
    assert at_home("~no such user.png") == Path("~no such user.png")
