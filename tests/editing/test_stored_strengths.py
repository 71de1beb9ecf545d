"""What an adapter remembers of a search."""

from __future__ import annotations

import json

import pytest

from personalize.adapters.adapter import Adapter
from personalize.editing.config import EditStrengths
from personalize.editing.stored_strengths import remember, remembered
from personalize.errors import UserError
from personalize.formats.adapter_folders import MANIFEST
from personalize.io.json_files import read_json
from tests.support.children import start_child
from tests.support.lora_states import random_adapter
from tests.support.tiny import tiny

CHOSEN = EditStrengths(alpha=0.7, beta=1.4, forget="decoderattn=0.5")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return random_adapter(tiny("sd1")).save(tmp_path_factory.mktemp("adapters") / "dog")


def test_the_best_setting_is_remembered_with_the_adapter(saved):
    before = Adapter.load(saved)
    remember(saved, "a dog  in the snow", CHOSEN, 5, {"score": 0.8})
    remember(saved, "a dog on the beach", EditStrengths(gamma=0.9), 6, {"score": 0.7})
    adapter = Adapter.load(saved)
    assert remembered(adapter.info, "a dog in the snow ") == (CHOSEN, 5)
    assert remembered(adapter.info, "a dog on the beach") == (EditStrengths(gamma=0.9), 6)
    assert remembered(adapter.info, "a cat") is None and remembered(before.info, "a dog in the snow") is None
    assert {key: adapter.lora[key].tolist() for key in adapter.lora} == {k: v.tolist() for k, v in before.lora.items()}
    again = adapter.save(saved)  # edits are part of what an adapter records of itself
    assert remembered(Adapter.load(again).info, "a dog in the snow") == (CHOSEN, 5)


def test_a_newer_best_takes_the_place_of_the_older(saved):
    remember(saved, "a dog", CHOSEN, 5, {})
    remember(saved, "a dog", EditStrengths(), 1, {})
    assert remembered(json.loads((saved / MANIFEST).read_text()), "a dog") == (EditStrengths(), 1)


def test_what_was_found_for_one_caption_is_not_used_for_another(saved):
    """An adapter of several pictures was edited with strengths that a search had found for another of them."""
    remember(saved, "a dog on grass", CHOSEN, 5, {"caption": "a cat on grass"})
    info = json.loads((saved / MANIFEST).read_text())
    assert remembered(info, "a dog on grass", "a cat on grass") == (CHOSEN, 5)
    assert remembered(info, "a dog on grass", "a dog in snow") is None
    info["edits"]["a dog on grass"].pop("caption")  # as earlier versions stored it
    assert remembered(info, "a dog on grass", "a dog in snow") == (CHOSEN, 5)


@pytest.mark.parametrize("entry", [{}, {"alpha": 1}, "much", {"alpha": "x", "beta": 1, "gamma": None, "forget": "none",
                                                             "strength": 1, "seed": 0}])  # fmt: skip
def test_a_damaged_entry_is_refused_in_one_line(entry):
    with pytest.raises(UserError, match="damaged: the remembered strengths of 'a dog'"):
        remembered({"edits": {"a dog": entry}}, "a dog")


def test_eight_writers_of_remembered_edits_lose_none(tmp_path):
    """Of 40 entries 11 survived, when each writer read, changed and replaced the file by itself."""
    (tmp_path / MANIFEST).write_text("{}")

    def write(writer):
        for number in range(5):
            remember(tmp_path, f"prompt {writer} {number}", EditStrengths(), number, {})

    for child in [start_child(lambda writer=writer: write(writer)) for writer in range(8)]:
        child()
    assert len(read_json(tmp_path / MANIFEST)["edits"]) == 40
