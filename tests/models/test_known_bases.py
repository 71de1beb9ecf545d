"""Adapters name their base without its path, and find it again on this machine."""

from __future__ import annotations

import shutil
import socket

import huggingface_hub.constants
import pytest
from huggingface_hub.utils import _detect_agent

from personalize.cli.main import main
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
    assert find_base({"name": "owner/name", "sha256": "00"}, allow_download=True) == "owner/name"
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


@pytest.fixture
def network(monkeypatch) -> list[object]:
    """What is asked of the network, which is not there."""
    asked: list[object] = []

    def refuse(*place: object, **_: object) -> None:
        asked.append(place)
        raise OSError("there is no network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return asked


@pytest.fixture
def of_the_hub(tmp_path, monkeypatch):
    """An adapter whose base is named by a hub id, and a function that downloads that base."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    model = StableDiffusion.load(tiny_folder("sd1", tmp_path / "place"))
    model.name = "owner/name"
    adapter = random_adapter(model)
    assert adapter.info["base"]["name"] == "owner/name"

    def download() -> None:
        place = tmp_path / "hub" / "models--owner--name"
        (place / "refs").mkdir(parents=True)
        (place / "refs" / "main").write_text("0" * 40)
        shutil.copytree(tmp_path / "place" / "tiny-sd1", place / "snapshots" / ("0" * 40))

    (tmp_path / "cache").exists() and shutil.rmtree(tmp_path / "cache")
    return adapter.save(tmp_path / "adapter"), download


def test_a_base_of_the_hub_is_not_asked_for_because_an_adapter_names_it(of_the_hub, network, capsys, tmp_path):
    """Whoever sends an adapter could see who opens it, and choose the gigabytes that are downloaded."""
    adapter, _ = of_the_hub
    lines = [["edit", str(adapter), "--prompt", "a", "--output_dir", str(tmp_path / "out")],
             ["export", "checkpoint", str(adapter), "--output", str(tmp_path / "whole.safetensors")],
             ["verify", str(adapter)], ["inspect", str(adapter)]]  # fmt: skip
    assert [main(line) for line in lines] == [2, 2, 0, 0] and network == []
    said = capsys.readouterr().err.splitlines()
    line = "personalize: the adapter names the base owner/name of the hub, which was not downloaded yet: allow it with "
    assert len(said) == 2 and all(each.startswith(line + "--allow_download") for each in said)
    with pytest.raises(UserError, match="allow_download"):
        Editor.load(adapter)
    assert network == []


def test_the_hub_is_asked_if_it_is_allowed_or_the_base_is_named(of_the_hub, network, capsys, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "diffusers.DiffusionPipeline.from_pretrained", lambda name, **how: asked.append((name, how)) or 1 / 0
    )
    line = ["edit", str(of_the_hub[0]), "--prompt", "a", "--output_dir", str(tmp_path / "out")]
    assert main([*line, "--allow_download"]) == 2 and main([*line, "--pretrained_model_name_or_path", "a/b"]) == 2
    assert [(name, how["local_files_only"], how["use_safetensors"]) for name, how in asked] == [
        ("owner/name", False, True), ("a/b", False, True)
    ]  # fmt: skip


def test_a_base_that_was_downloaded_is_used_without_the_network(of_the_hub, network, monkeypatch, tmp_path):
    adapter, download = of_the_hub
    offline = huggingface_hub.constants.HF_HUB_OFFLINE
    download()
    monkeypatch.setattr(_detect_agent, "_registry", None)  # fetched once in a process, for files in the cache too
    monkeypatch.setattr(huggingface_hub.constants, "AGENT_HARNESSES_PATH", str(tmp_path / "none"))
    editor = Editor.load(adapter)
    assert editor.model.name == "owner/name" and network == []
    assert huggingface_hub.constants.HF_HUB_OFFLINE == offline, "left as it was"


@pytest.mark.parametrize("name", ["//host/share/model", "\\\\host\\share", "../a/b", "owner/name/more", "https://a/b"])
def test_names_that_are_neither_here_nor_of_the_hub_are_refused(name: str, network, monkeypatch):
    monkeypatch.setattr("pathlib.Path.exists", lambda path, **_: "host" in str(path))
    with pytest.raises(UserError, match="not used on this machine"):
        find_base({"name": name}, allow_download=True)
    assert network == []
