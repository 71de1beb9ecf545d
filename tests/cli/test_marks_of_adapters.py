"""Marks name adapters of every form, and what they need is read before anything is drawn."""

from __future__ import annotations

import json
import shutil

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from personalize.cli.main import main
from personalize.cli.redrawing import adapter_name_and_hash, redrawn
from personalize.errors import UserError
from personalize.io.provenance import Provenance, picture_bytes, read_marks
from tests.support.lora_states import random_adapter
from tests.support.tiny import tiny, tiny_folder

PROMPT = "a dog in the snow"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_folder("sd1", tmp_path_factory.mktemp("base"))


@pytest.fixture
def photo(tmp_path):
    Image.linear_gradient("L").resize((96, 64)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def run(base, out, *words) -> int:
    more = ("--pretrained_model_name_or_path", base, "--output_dir", out, "--num_inference_steps", "2")
    return main([*map(str, (*words, *more))])


def adapters_of_others(folder, monkeypatch):
    """The same LoRA as a folder of PEFT, as shards with their index, and as a file on the hub: name → what is typed."""
    state, cache = random_adapter(tiny("sd1")).lora, folder / "blobs"
    unet = {f"base_model.model.{key.removeprefix('unet.')}": tensor for key, tensor in state.items()}
    (folder / "peft").mkdir()
    save_file(unet, folder / "peft" / "adapter_model.safetensors")
    (folder / "peft" / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 4, "peft_type": "LORA"}))
    (folder / "shards").mkdir()
    keys, places = sorted(state), {}
    for number, part in enumerate((keys[:3], keys[3:]), 1):
        places |= dict.fromkeys(part, f"x-{number}.safetensors")
        save_file({key: state[key] for key in part}, folder / "shards" / f"x-{number}.safetensors")
    index = folder / "shards" / "x.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    cache.mkdir()
    saved = random_adapter(tiny("sd1")).save(folder / "saved")
    shutil.copy(saved / "pytorch_lora_weights.safetensors", cache / "0123456789abcdef")
    (folder / "cat.safetensors").symlink_to(cache / "0123456789abcdef")  # as the hub's cache does
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *name: str(folder / "cat.safetensors"))
    return {"peft": folder / "peft", "shards": folder / "shards", "x.safetensors.index.json": index,
            "cat.safetensors": "someone/cat:cat.safetensors"}  # fmt: skip


def test_adapters_of_any_form_are_named_in_the_marks(base, photo, tmp_path, monkeypatch, capsys):
    hashes = {}
    for name, typed in adapters_of_others(tmp_path, monkeypatch).items():
        out = tmp_path / f"out-{name}"
        assert run(base, out, "edit", typed, "--prompt", PROMPT) == 0
        kept = read_marks(out / "edit-000.png").details["adapters"][0]
        assert kept["name"] == name
        hashes[name] = kept["sha256"]
        if name in ("shards", "cat.safetensors"):  # found near the picture, whatever its form
            assert run(base, tmp_path / f"again-{name}", "edit", "--from", out / "edit-000.png") == 0
            assert read_marks(tmp_path / f"again-{name}" / "edit-000.png").details["adapters"] == [kept]
    assert hashes["shards"] == hashes["x.safetensors.index.json"], "the same weights"
    assert len(set(hashes.values())) == 3
    words = ("edit", photo, "--source", "a cat on grass", "--swap", "cat=dog", "--adapter", tmp_path / "peft")
    assert run(base, tmp_path / "photo", *words) == 0
    assert read_marks(tmp_path / "photo" / "edited.png").details["adapters"] == [
        {"name": "peft", "sha256": hashes["peft"]}
    ]
    weights = tmp_path / "shards" / "x-2.safetensors"
    save_file({key: tensor * 2 for key, tensor in load_file(weights).items()}, weights)
    capsys.readouterr()
    picture = tmp_path / "out-shards" / "edit-000.png"
    index = tmp_path / "shards" / "x.safetensors.index.json"
    assert run(base, tmp_path / "again", "edit", index, "--from", tmp_path / "out-peft" / "edit-000.png") == 2
    assert run(base, tmp_path / "no", "edit", tmp_path / "shards", "--from", picture) == 2
    assert "drawn with the adapter shards" in capsys.readouterr().err
    for command in ("inspect", "verify"):
        assert main([command, "someone/cat:cat.safetensors"]) == 0
        assert "cat.safetensors" in capsys.readouterr().out


def test_a_folder_of_peft_and_diffusers_files_has_the_hash_of_what_is_read(tmp_path, monkeypatch):
    """PEFT's two files are read, the LoRA in diffusers' names beside them is not."""
    peft = adapters_of_others(tmp_path, monkeypatch)["peft"]
    alone = adapter_name_and_hash(peft)
    shutil.copy(tmp_path / "saved" / "pytorch_lora_weights.safetensors", peft)
    assert adapter_name_and_hash(peft) == alone
    picture = tmp_path / "edit-000.png"
    details = {"command": "edit", "adapters": [alone], "base": {"name": "x", "sha256": ""}, "options": {}}
    picture.write_bytes(picture_bytes(Image.new("RGB", (32, 32)), Provenance(details=details)))
    assert redrawn([], picture)[1] == [str(peft)], "found near the picture"


def test_what_the_marks_need_is_read_before_anything_is_drawn(base, photo, tmp_path, monkeypatch):
    def unreadable(path):
        raise UserError(f"{path} cannot be read")

    monkeypatch.setattr("personalize.cli.redrawing.file_hash", unreadable)
    monkeypatch.setattr("personalize.editing.editor.Editor._sample", lambda *given: pytest.fail("drawn"))
    monkeypatch.setattr("personalize.editing.editor.edit_photo", lambda *given, **more: pytest.fail("drawn"))
    monkeypatch.setattr("personalize.editing.editor.drag_picture", lambda *given, **more: pytest.fail("drawn"))
    adapter = random_adapter(tiny("sd1")).save(tmp_path / "adapter")
    for words in (
        ("edit", adapter, "--prompt", PROMPT),
        ("edit", photo, "--source", "a cat on grass", "--swap", "cat=dog"),
        ("drag", photo, "--from", "10,10", "--to", "20,10"),
    ):
        assert run(base, tmp_path / "out", *words) == 2


@pytest.mark.parametrize("name", ["", "x" * 300, "a[", "..", "/"])
def test_an_adapter_of_a_name_that_no_file_has_is_not_found(name, tmp_path):
    """The name stands in a picture, which may come from anywhere."""
    details = {"command": "edit", "adapters": [{"name": name, "sha256": "0" * 64}], "base": {"name": "x", "sha256": ""}}
    picture = tmp_path / "hostile.png"
    picture.write_bytes(picture_bytes(Image.new("RGB", (32, 32)), Provenance(details={**details, "options": {}})))
    with pytest.raises(UserError, match="neither near it nor here: name it first"):
        redrawn([], picture)
