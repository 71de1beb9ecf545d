"""Adapters name their base without its path, and find it again on this machine."""

from __future__ import annotations

import shutil

import pytest

from personalize.editing.editor import Editor
from personalize.errors import UserError
from personalize.models.known_bases import base_here, find_base, portable_name, remember_base
from personalize.models.stable_diffusion import StableDiffusion
from tests.support.lora_states import random_adapter
from tests.support.tiny import tiny_folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_a_base_is_named_without_its_path_and_found_by_its_hash(tmp_path):
    folder = tiny_folder("sd1", tmp_path / "secret-place")
    model = StableDiffusion.load(folder)
    adapter = random_adapter(model).save(tmp_path / "adapter")
    about = model.about()
    assert about["name"] == folder.name and "secret" not in (tmp_path / "adapter" / "adapter.json").read_text()
    assert find_base(about) == base_here(about) == str(folder)
    assert Editor.load(adapter).model.identity == model.identity
    shutil.rmtree(folder)
    with pytest.raises(UserError, match=f"trained on the base {folder.name} .*--pretrained_model_name_or_path"):
        Editor.load(adapter)


def test_what_is_no_path_stays_as_it_is(tmp_path):
    assert portable_name("owner/name") == "owner/name" and portable_name("") == ""
    assert find_base({"name": "owner/name", "sha256": "00"}) == "owner/name"
    assert find_base({"name": "embedded"}) is None and find_base({}) is None
    assert base_here({"name": "owner/name", "sha256": "00"}) is None


@pytest.mark.parametrize("content", ["", "[1]", '{"00": 3}', "\x00"])
def test_a_damaged_cache_is_as_none_and_is_written_anew(content: str, tmp_path):
    file = tmp_path / "cache" / "personalize" / "bases.json"
    file.parent.mkdir(parents=True)
    file.write_text(content)
    assert base_here({"sha256": "00"}) is None
    remember_base("00", str(tmp_path))
    assert base_here({"sha256": "00"}) == str(tmp_path)


def test_a_cache_that_cannot_be_written_costs_nothing(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    remember_base("00", str(tmp_path))
    assert base_here({"sha256": "00"}) is None
