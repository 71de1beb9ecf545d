"""Uploading, against a hub that is not there."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest

from personalize.adapters import hub
from personalize.errors import UserError
from tests.support.hub import Hub


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    monkeypatch.setattr(Hub, "calls", [])
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    return Hub


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "adapter.json").write_text('{"files": ["adapter.json", "mine.safetensors"]}')
    return tmp_path


def test_the_repository_is_made_private_where_a_person_is_shown(api: type[Hub]) -> None:
    assert hub.repository("mine", private=True) == "me/mine"
    assert api.calls == [{"repo_id": "mine", "private": True, "exist_ok": True}]


def test_only_the_adapters_own_files_go_up(api: type[Hub], folder: Path) -> None:
    assert hub.push(folder, "me/mine") == "https://hub/me/mine"
    (call,) = api.calls
    assert call["allow_patterns"] == ["adapter.json", "mine.safetensors"] and call["folder_path"] == folder


def test_failures_are_one_line_and_say_what_to_do(api: type[Hub], folder: Path, monkeypatch) -> None:
    monkeypatch.setattr(api, "broken", "create")
    with pytest.raises(UserError, match=r"cannot use repository mine: 401 who are you; try `hf auth login`"):
        hub.repository("mine", private=False)
    monkeypatch.setattr(api, "broken", "upload")
    with pytest.raises(UserError, match="is safe in .* the line is dead; hf upload me/mine"):
        hub.push(folder, "me/mine")
