"""Progress is reported to a listener, and to nobody without one."""

from __future__ import annotations

import pytest

from personalize.sampling.config import NullTextSettings
from personalize.sampling.inversion import invert
from personalize.sampling.progress import listening, part, ticked
from tests.support.photos import SOURCE, shared, smooth


def test_a_listener_hears_every_part_and_step_and_nothing_afterwards():
    heard: list[str] = []

    def listener(name: str, steps: int):
        heard.append(f"{name} {steps}")
        return lambda: heard.append(name)

    with listening(listener):
        invert(shared(), smooth(), SOURCE, "null-text", steps=2, null_text=NullTextSettings(iterations=1))
    expected = [f"{name}{end}" for name in ("Inverting", "Fitting null embeddings") for end in (" 2", "", "")]
    assert heard == expected
    assert list(ticked([1, 2])) == [1, 2] and heard == expected


def test_names_and_listeners_end_with_their_body_also_after_an_error():
    heard: list[str] = []
    with pytest.raises(ZeroDivisionError), listening(lambda name, steps: heard.append(name) or (lambda: None)):
        with part("Outer"):
            list(ticked([0]))
            with part("Inner"):
                list(ticked([0]))
            list(ticked([0]))
        raise ZeroDivisionError
    list(ticked([0]))
    assert heard == ["Outer", "Inner", "Outer"]
