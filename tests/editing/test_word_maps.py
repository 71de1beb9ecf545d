"""Where each word of a photo looks, before an edit."""

from __future__ import annotations

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
