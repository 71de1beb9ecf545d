"""`._x` beside every x, as macOS leaves on disks and in archives of other systems, is taken for no file of ours."""

import json
import warnings

import pytest
import torch
from safetensors.torch import save_file

from personalize.adapters.adapter import Adapter
from personalize.cli.main import main
from personalize.formats.adapter_source import open_adapter
from personalize.formats.folder_inspection import inspect_folder
from personalize.formats.verification import verify_folder
from personalize.models import loading
from personalize.training import checkpoints
from personalize.training.checkpoints import Checkpoint
from tests.support.adapter_kinds import unet_lora
from tests.support.lora_states import random_adapter
from tests.support.tiny import tiny, tiny_folder


def shadowed(folder):
    """`folder` with macOS' file beside each of its files."""
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        (path.parent / f"._{path.name}").write_bytes(b"\0\5\26\7" + bytes(60))
        (path.parent / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    return folder


def test_adapter_folders_are_read_verified_and_listed(tmp_path):
    folder = random_adapter(tiny("sd1")).save(tmp_path / "mine")
    lines = [row.file for row in inspect_folder(folder)]
    shadowed(folder)
    assert Adapter.load(folder).lora and verify_folder(folder).ok and open_adapter(folder).tensors
    assert [row.file for row in inspect_folder(folder)] == lines


def test_shards_have_one_index(tmp_path):
    state = unet_lora()
    save_file(state, tmp_path / "x-00001-of-00001.safetensors")
    places = dict.fromkeys(state, "x-00001-of-00001.safetensors")
    (tmp_path / "x.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert open_adapter(shadowed(tmp_path)).tensors.keys() == state.keys()
    assert len(inspect_folder(tmp_path)) == 1


def test_base_models_are_loaded(tmp_path):
    folder = tiny_folder("sd1", tmp_path)
    plain = loading.load_pipeline(folder, torch.float32).unet.state_dict()
    found = loading.load_pipeline(shadowed(folder), torch.float32).unet.state_dict()
    assert plain.keys() == found.keys() and all(torch.equal(found[key], tensor) for key, tensor in plain.items())


def test_the_latest_checkpoint_is_found(tmp_path):
    parameter = torch.nn.Parameter(torch.ones(2))
    state = torch.optim.Adam([parameter]).state_dict()
    checkpoints.save(tmp_path, Checkpoint(1, {"a": parameter.detach()}, state, {}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checkpoints.find(shadowed(tmp_path), "latest").update == 1


@pytest.mark.parametrize(
    "words", [["export", "comfyui"], ["convert", "cat.safetensors", "--to", "peft", "--overwrite", "--output"]]
)
def test_a_folder_that_looks_empty_is_written_into(tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    save_file(unet_lora(), "cat.safetensors")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    assert main([*words, "new"]) == 0
    assert len(list((tmp_path / "new").iterdir())) > 2
