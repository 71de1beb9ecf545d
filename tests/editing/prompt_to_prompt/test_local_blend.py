"""Local blend: which words say where a photo may change."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from personalize.editing.prompt_to_prompt.local_blend import per_word, word_blend
from personalize.errors import UserError
from personalize.models.prompts import tokenize_prompt
from tests.support.photos import shared


def test_a_word_alone_counts_in_those_prompts_that_have_it():
    """`--local cat` of "a cat …" → "a dog …": where the source has the cat; `--local hat`: where the target has it."""
    source, target = (
        tokenize_prompt(shared(), "a cat on the beach"),
        tokenize_prompt(shared(), "a dog on the beach with a hat"),
    )
    for word, rows in (("cat", [True, False]), ("hat", [False, True]), ("beach", [True, True])):
        _, blend = word_blend(shared(), source, [target], [(word, word)], 0.3, 0)
        assert [bool(row.any()) for row in blend.words] == rows
    for words in ([("fox", "fox")], [("cat", "fox")], [("hat", "dog")]):
        with pytest.raises(UserError, match="is not in the prompt"):
            word_blend(shared(), source, [target], words, 0.3, 0)


def test_each_of_several_words_has_a_region_of_its_own():
    """Maps were summed before the threshold: a word that looks at all of a background had no region beside a cat."""
    maps, blend = word_blend(
        shared(),
        tokenize_prompt(shared(), "a cat on the beach"),
        [tokenize_prompt(shared(), "a dog on the snow")],
        [("cat", "dog"), ("beach", "snow")],
        0.3,
        0,
    )
    assert blend.words.shape == (2, 2, 77)
    seen = torch.zeros(2, 1, 8, 8, 77)  # of one head, by row and column
    seen[:, :, 1, 1, 2] = 0.9  # cat and dog: one place
    seen[:, :, 4:, :, 5] = 0.1  # beach and snow: the lower half
    maps.probs(seen.flatten(2, 3), SimpleNamespace(height=8, width=8))
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[:3, :3] = expected[3:] = True  # pooled 3×3
    assert torch.equal(blend.mask((8, 8))[1, 0], expected)


def test_a_word_within_a_phrase_has_its_own_value():
    """`--weight cat=3 "a cat=2"`: the last alone counted, whichever it was."""
    tokens = tokenize_prompt(shared(), "a cat on the beach")
    for values in ({"a cat": 2.0, "cat": 3.0}, {"cat": 3.0, "a cat": 2.0}):
        assert per_word(tokens, values, 1.0, 77)[:5].tolist() == [1, 2, 3, 1, 1]
