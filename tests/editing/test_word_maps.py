"""Where each word of a photo looks, before an edit."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from personalize.editing.photo_settings import PhotoSettings
from personalize.editing.word_maps import word_maps
from tests.support.photos import SOURCE, photo, shared


def test_each_word_that_says_something_has_a_map_of_the_photos_size():
    maps = word_maps(shared(), photo(), SOURCE, PhotoSettings(steps=2, resolution=32))
    said = [word for word in SOURCE.lower().split() if word not in ("a", "the", "of", "on", "in", "and")]
    assert list(maps) == list(dict.fromkeys(said))
    sizes = {one.size for one in maps.values()}
    assert len(sizes) == 1 and min(next(iter(sizes))) >= 32
    assert len({one.tobytes() for one in maps.values()}) == len(maps), "the words do not all look at the same"


def test_a_word_that_is_said_twice_is_shown_with_all_that_it_looks_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """The map of “cat” was that of the second alone."""
    heat = torch.zeros(1, 8, 8, 77)
    heat[0, 0, 0, 2], heat[0, 4, 4, 6] = 1, 1  # start, "a", "cat", …
    monkeypatch.setattr(
        "personalize.editing.word_maps.record_maps", lambda *_: SimpleNamespace(cross_attention=lambda: heat)
    )
    settings, maps = PhotoSettings(steps=2, resolution=32), []
    for seen in (heat.clone(), heat.clone().index_fill_(-1, torch.tensor(2), 0)):
        heat = seen
        maps.append(word_maps(shared(), photo(), "a cat and a dog cat", settings))
    assert list(maps[0]) == ["cat", "dog"]
    assert maps[0]["cat"].tobytes() != maps[1]["cat"].tobytes() and maps[0]["dog"].tobytes() == maps[1]["dog"].tobytes()
