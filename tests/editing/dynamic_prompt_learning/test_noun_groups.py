"""Nouns of a prompt as tokens: found, named, repeated, learned (dpl.md §6.2)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from personalize.adapters.textual_inversion import installed_tokens
from personalize.editing.dynamic_prompt_learning.fit import noun_rows
from personalize.editing.dynamic_prompt_learning.noun_groups import group_maps, noun_groups
from personalize.errors import UserError
from tests.support.tiny import tiny_sd1


def test_dpl_c02_nouns_are_found_by_character_offsets():
    """ "beachball" is no word of the tiny tokenizer, so it has several pieces; splitting at spaces would miss all."""
    model = tiny_sd1()
    text = "A Cat, a beachball and a dog"
    pieces = model.tokens("beachball")
    assert len(pieces) > 1
    groups = noun_groups(model, text)
    assert [group.name for group in groups] == ["cat", "beachball", "dog"]
    assert [len(group.positions) for group in groups] == [1, len(pieces), 1]
    dog = model.tokens(text).index("dog") + 1
    assert groups[2].positions == (dog,) != (text.split().index("dog") + 1,)


def test_dpl_c02_nouns_may_have_accents_of_their_own():
    """ "é" as two characters, as macOS and PDFs have it, ended a word in its middle, which was then no word."""
    (cafe,) = noun_groups(tiny_sd1(), "a cafe\u0301 on a cafe\u0301")
    assert cafe.name == "caf\u00e9"
    (named,) = noun_groups(tiny_sd1(), "a caf\u00e9 on a cat", ["cafe\u0301"])
    assert named == replace(cafe, positions=named.positions), "named in either form"


def test_a_noun_within_another_one_is_not_its_own_object():
    """The group "dog" had the dog of the dog house too, so that the two could never look apart."""
    model, text = tiny_sd1(), "a dog on a dog house"
    dog, house = noun_groups(model, text)
    assert (dog.name, house.name) == ("dog", "dog house")
    at = [number for number, piece in enumerate(model.tokens(text), 1) if piece == "dog"]
    assert dog.positions == (at[0],) and at[1] in house.positions and at[0] not in house.positions
    (named,) = noun_groups(model, text, ["dog"])
    assert named.positions == tuple(at), "beside no longer one all dogs are one thing"
    alone, _ = noun_groups(model, "a dog house", ["dog", "dog house"])
    assert alone.positions, "it stands nowhere else"


def test_dpl_c02_repeated_nouns_and_synonyms_are_one_thing():
    model = tiny_sd1()
    (cats,) = noun_groups(model, "a cat and a cat")
    assert cats.positions == (2, 5) and len(cats.ids[0]) == 1
    (both,) = noun_groups(model, "a cat and a fox", ["cat=fox"])
    assert both.positions == (2, 5) and len(both.ids[0]) == 2 and both.name == "cat/fox"
    attention = torch.rand(4, 4, 77)
    torch.testing.assert_close(group_maps(attention, [both])[0], attention[..., [2, 5]].mean(-1))


def test_dpl_c02_named_nouns_override_and_wrong_ones_are_refused():
    model = tiny_sd1()
    assert [group.name for group in noun_groups(model, "a cat and a dog", ["dog"])] == ["dog"]
    for named, words in ((["dogs"], "did you mean dog"), (["cat", "Cat"], "named twice")):
        with pytest.raises(UserError, match=words):
            noun_groups(model, "a cat and a dog", named)
    with pytest.raises(UserError, match="no noun was found"):
        noun_groups(model, "in the red")


def test_dpl_c02_a_learned_token_can_be_a_noun():
    model = tiny_sd1()
    rows = {"<cat1>": {"text_encoder": torch.randn(2, 32)}}
    with installed_tokens(model, rows):
        (group,) = noun_groups(model, "a <cat1> on the beach", ["<cat1>"])
        assert group.positions == (2, 3)
        plain = model.prompts(["a <cat1>"]).embeds
        with noun_rows(model, [group]) as (layer,):
            torch.testing.assert_close(layer.weight.data, rows["<cat1>"]["text_encoder"], rtol=0, atol=0)
            assert torch.equal(model.prompts(["a <cat1>"]).embeds, plain)
