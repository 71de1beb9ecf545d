"""What a person may name as an adapter: files, folders of PEFT, shards, a file on the hub."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import save_file

from personalize.adapters.adapter import Adapter
from personalize.cli.main import main
from personalize.errors import UserError
from personalize.formats.adapter_folders import DIFFUSERS_FILE
from personalize.formats.adapter_source import fetched, open_adapter
from tests.support.adapter_kinds import KINDS, unet_lora
from tests.support.lora_states import random_adapter
from tests.support.tiny import tiny


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with one repository, "someone/cat", whose files lie in the folder that this returns."""
    store, cache = tmp_path / "store", tmp_path / "cache"
    store.mkdir()

    def download(repository, name):
        if repository != "someone/cat" or not (store / name).is_file():
            raise EntryNotFoundError(f"404: no {name} in {repository}\nsecond line")
        (cache / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(store / name, cache / name)
        return str(cache / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return store


def test_a_file_on_the_hub_is_read_with_the_settings_beside_it(hub):
    kind = KINDS["PEFT folder"]()
    kind.write(hub / "sub")
    adapter = Adapter.load("someone/cat:sub/adapter_model.safetensors")
    local = Adapter.load(hub / "sub")
    assert adapter.alpha == local.alpha and all(torch.equal(adapter.lora[key], local.lora[key]) for key in local.lora)
    save_file(unet_lora(), hub / "plain.safetensors")
    assert len(open_adapter("someone/cat:plain.safetensors").tensors) == 16


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("someone/cat:x.bin", "only .safetensors"),
        ("someone/cat:gone.safetensors", "^cannot get gone.safetensors of someone/cat from the hub: 404"),
        ("someone/cat:../up.safetensors", "does not exist"),
    ],
)
def test_what_the_hub_does_not_give_is_one_line(hub, name, message):
    with pytest.raises(UserError, match=message) as caught:
        open_adapter(name)
    assert "\n" not in str(caught.value)


def test_a_local_file_of_such_a_name_goes_first(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "someone").mkdir()
    save_file(unet_lora(), tmp_path / "someone" / "cat:plain.safetensors")
    assert fetched("someone/cat:plain.safetensors") == Path("someone/cat:plain.safetensors")


def test_shards_are_one_file_and_must_agree_with_their_index(tmp_path):
    state = unet_lora()
    halves = [dict(list(state.items())[:8]), dict(list(state.items())[8:])]
    names = [f"x-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for name, half in zip(names, halves, strict=True):
        save_file(half, tmp_path / name)
    index = tmp_path / "x.safetensors.index.json"
    places = {key: name for name, half in zip(names, halves, strict=True) for key in half}
    index.write_text(json.dumps({"weight_map": places}))
    for source in (index, tmp_path):
        assert all(torch.equal(open_adapter(source).tensors[key], tensor) for key, tensor in state.items())
    index.write_text(json.dumps({"weight_map": places | {"more": names[0]}}))
    with pytest.raises(UserError, match="do not agree on the tensor 'more'"):
        open_adapter(index)
    index.write_text(json.dumps({"weight_map": {key: f"../{name}" for key, name in places.items()}}))
    with pytest.raises(UserError, match="beside it were expected"):
        open_adapter(index)


def test_a_folder_of_diffusers_training_scripts_is_read_by_every_command(tmp_path):
    """`convert` took it, `edit` and `export` refused it."""
    saved = random_adapter(tiny("sd1")).save(tmp_path / "cat")
    theirs = tmp_path / "theirs"
    (theirs / "checkpoint-500").mkdir(parents=True)
    (theirs / DIFFUSERS_FILE).write_bytes((saved / DIFFUSERS_FILE).read_bytes())
    loaded, file = Adapter.load(theirs), Adapter.load(saved / DIFFUSERS_FILE)
    assert loaded.source is None and loaded.lora.keys() == file.lora.keys() == Adapter.load(saved).lora.keys()
    assert all(torch.equal(loaded.lora[key], file.lora[key]) for key in file.lora) and loaded.alpha == file.alpha
    assert main(["export", "lora", str(theirs), "--output", str(tmp_path / "theirs.safetensors")]) == 0
    assert main(["convert", str(theirs), "--to", "kohya", "--output", str(tmp_path / "converted.safetensors")]) == 0


def test_a_folder_of_ours_is_read_as_its_lora(tmp_path):
    """`convert my-cat` refused the folder that every other command takes."""
    model = tiny("sd1")
    folder = random_adapter(model).save(tmp_path / "cat")
    whole, file = open_adapter(folder), open_adapter(folder / "pytorch_lora_weights.safetensors")
    assert whole.tensors.keys() == file.tensors.keys() and whole.metadata == file.metadata
    assert main(["convert", str(folder), "--to", "kohya", "--output", str(tmp_path / "cat.safetensors")]) == 0


def test_verify_takes_the_folder_of_diffusers_training_scripts_and_says_what_other_folders_are(tmp_path, capsys):
    """It looked for our adapter.json in them, and said that this file does not exist."""
    (theirs := tmp_path / "theirs").mkdir()
    saved = random_adapter(tiny("sd1")).save(tmp_path / "cat")
    (theirs / DIFFUSERS_FILE).write_bytes((saved / DIFFUSERS_FILE).read_bytes())
    assert main(["verify", str(theirs)]) == 0 and "modules match" in capsys.readouterr().out
    KINDS["PEFT folder"]().write(tmp_path / "peft")
    assert main(["verify", str(tmp_path / "peft")]) == 2
    assert "is a folder of PEFT or of shards, one LoRA file was expected" in capsys.readouterr().err
    assert main(["verify", str(tmp_path)]) == 2 and "is no adapter folder" in capsys.readouterr().err
