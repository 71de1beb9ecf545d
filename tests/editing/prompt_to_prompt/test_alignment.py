"""Which tokens of one prompt answer to which of another."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from personalize.adapters.textual_inversion import installed_tokens
from personalize.editing.prompt_to_prompt.alignment import (
    adjective_bindings,
    differ_word_for_word,
    phrase_swaps,
    refinement_mapper,
    replacement_mapper,
    swap_words,
    word_swaps,
)
from personalize.errors import UserError
from personalize.models.prompts import tokenize_prompt
from tests.support.tiny import tiny

START, END = 90, 91
VOCABULARY = dict.fromkeys("a cat and dog fluffy lion photo of watercolor painting red on mat x y z".split())
IDS = {word: number for number, word in enumerate(VOCABULARY)}


def ids(text: str, length: int = 0) -> list[int]:
    """One id a word, between the marks, padded with the end mark to `length`."""
    found = [START, *(IDS[word] for word in text.split()), END]
    return found + [END] * (length - len(found))


@cache
def model():
    return tiny("sd1")  # every one-syllable word of its vocabulary is a piece, others are spelled


TABLE = {
    ("a cat and a dog", "a fluffy cat and a dog"): [0, 1, -1, 2, 3, 4, 5, 6],
    ("a cat and a dog", "a lion and a dog"): [0, 1, -1, 3, 4, 5, 6],
    ("a photo of a cat", "a watercolor painting of a cat"): [0, 1, -1, -1, 3, 4, 5, 6],
    ("a cat and a cat", "a cat and a red cat"): [0, 1, 2, 3, 4, -1, 5, 6],
}


@pytest.mark.parametrize(("source", "target"), TABLE)
@pytest.mark.parametrize("length", [0, 77])
def test_dpl_c67_refinement_table(source, target, length):
    expected = TABLE[source, target]
    mapper, alphas = refinement_mapper(ids(source, length), ids(target, length))
    assert len(mapper) == len(alphas) == (length or len(expected))
    assert mapper[: len(expected)].tolist() == expected
    assert alphas[: len(expected)].tolist() == [float(at >= 0) for at in expected]
    assert mapper[len(expected) :].tolist() == list(range(len(expected), length))  # the padding maps to itself


def reference_mapper(source: list[int], target: list[int], swaps) -> torch.Tensor:
    """What the published code does: behind the last swap the diagonal goes on by *target* index."""
    matrix = replacement_mapper(source, target, swaps)
    last = max(there[-1] for _, there in swaps) + 1
    matrix[:, last:] = 0
    for at in range(last, len(target)):
        matrix[min(at, len(source) - 1), at] = 1
    return matrix


def follows(matrix: torch.Tensor) -> list[int]:
    return matrix.argmax(0).tolist()


def test_dpl_c67_words_behind_a_swap_of_more_pieces_keep_their_own_map():
    """ "a cat on mat", cat → three pieces: "on" and "mat" answer to themselves; in the published code they do not."""
    source, target = ids("a cat on mat", 77), ids("a x y z on mat", 77)
    swaps = [((2,), (2, 3, 4))]
    right, wrong = (mapper(source, target, swaps) for mapper in (replacement_mapper, reference_mapper))
    assert follows(right)[:8] == [0, 1, 2, 2, 2, 3, 4, 5] and follows(right)[-2:] == [73, 74]
    assert follows(wrong)[5:7] == [5, 6]  # "on" reads the end mark, "mat" the padding
    assert right[2, 2:5].tolist() == pytest.approx([1 / 3] * 3)


def test_dpl_c67_fewer_pieces_shift_the_other_way_and_end_in_the_padding():
    source, target = ids("a x y z on mat", 77), ids("a cat on mat", 77)
    matrix = replacement_mapper(source, target, [((2, 3, 4), (2,))])
    assert follows(matrix)[3:6] == [5, 6, 7] and follows(matrix)[-3:] == [76, 76, 76]
    assert matrix[2:5, 2].tolist() == [1, 1, 1]


def test_dpl_c67_column_sums_are_m_over_n_and_one_elsewhere():
    source, target = ids("a x y on cat", 77), ids("a x y z on dog", 77)
    matrix = replacement_mapper(source, target, {(2, 3): (2, 3, 4), 5: 6})
    sums = matrix.sum(0)
    torch.testing.assert_close(sums[2:5], torch.full((3,), 2 / 3))
    others = torch.tensor([at for at in range(77) if at not in (2, 3, 4)])
    assert torch.equal(sums[others], torch.ones(74)) and matrix[5, 6] == 1


def test_dpl_c67_equal_prompts_map_to_themselves():
    both = ids("a cat on mat", 77)
    assert torch.equal(replacement_mapper(both, both, []), torch.eye(77))
    assert refinement_mapper(both, both)[0].tolist() == list(range(77))


def test_pieces_go_one_to_one_where_they_are_equally_many_and_swaps_may_come_in_any_order():
    source, target = ids("a x y on cat"), ids("a y x on dog")
    matrix = replacement_mapper(source, target, [((5,), (5,)), ((2, 3), (2, 3))])
    assert torch.equal(matrix, torch.eye(7))


@pytest.mark.parametrize("swaps", [[((2, 3), (2,)), ((3,), (3,))], [((2,), (4,))]])
def test_swaps_that_do_not_fit_are_refused(swaps):
    with pytest.raises(ValueError, match="overlap, or what lies between"):
        replacement_mapper(ids("a cat on mat"), ids("a dog on mat"), swaps)


def test_words_are_found_by_their_characters():
    prompt_tokens = tokenize_prompt(model(), "A red Cat, sitting on  the unicorns and a cat")
    assert [word.text for word in prompt_tokens.words] == "a red cat , sitting on the unicorns and a cat".split()
    assert prompt_tokens.find("cat") == [(3,), (18,)] and prompt_tokens.find("CAT,") == [(3, 4)]
    assert prompt_tokens.find("unicorns") == [tuple(range(8, 16))]  # spelled out, letter by letter
    assert prompt_tokens.find("red cat") == [(2, 3)]
    assert prompt_tokens.ids[0] == 567 and len(prompt_tokens.ids) == 20


def test_accents_are_found_composed_or_not():
    """ "é" is one character or two, by keyboard and program."""
    apart = "a cafe\u0301 on the beach"
    for prompt, phrase in ((apart, "caf\u00e9"), ("a caf\u00e9 on the beach", "cafe\u0301"), (apart, "cafe\u0301")):
        tokens = tokenize_prompt(model(), prompt)
        assert [word.text for word in tokens.words] == ["a", "caf\u00e9", "on", "the", "beach"]
        assert tokens.find(phrase) == [tokens.words[1].positions]
        assert swap_words(tokens, [(phrase, "dog")]) == "a dog on the beach"


def test_a_word_that_is_not_there_names_the_nearest():
    prompt_tokens = tokenize_prompt(model(), "a cat on the beach")
    with pytest.raises(
        UserError, match="the word 'beech' is not in the prompt 'a cat on the beach': did you mean beach"
    ):
        prompt_tokens.find("beech")
    with pytest.raises(UserError, match="its words are a, cat, on, the, beach"):
        prompt_tokens.find("xylophone")


def test_words_behind_the_first_75_tokens_stand_in_the_second_chunk():
    assert tokenize_prompt(model(), "cat " * 75).length == 77
    long = tokenize_prompt(model(), "cat " * 75 + "dog")
    assert long.length == 154 and long.find("dog") == [(78,)] and long.places[-3:] == (75, 78, 79)


def test_learned_tokens_of_several_vectors_are_one_word():
    base = model()
    with installed_tokens(base, {"<cat1>": {"text_encoder": torch.zeros(2, 32)}}):
        prompt_tokens = tokenize_prompt(base, "a <cat1> cat")
        assert prompt_tokens.find("<cat1>") == [(2, 3)] and prompt_tokens.find("cat") == [(4,)]
        assert prompt_tokens.find("<cat1> cat") == [(2, 3, 4)]
        assert len(prompt_tokens.ids) == 6
        assert tokenize_prompt(base, "A <Cat1> cat").ids == prompt_tokens.ids, "the second vector was left out"


def test_learned_tokens_of_several_vectors_are_swapped():
    """Their further vectors counted as words, so that such a swap was refused, and in `auto` was no replacement."""
    base = model()
    with installed_tokens(base, {"<cat1>": {"text_encoder": torch.zeros(2, 32)}}):
        plain, learned = tokenize_prompt(base, "a cat on snow"), tokenize_prompt(base, "a <cat1> on snow")
        assert phrase_swaps(plain, learned, [("cat", "<cat1>")]) == word_swaps(plain, learned) == [((2,), (2, 3))]
        assert phrase_swaps(learned, plain, [("<cat1>", "cat")]) == word_swaps(learned, plain) == [((2, 3), (2,))]
        assert differ_word_for_word(plain, learned)


def test_words_that_differ_are_swapped():
    base = model()
    pairs = word_swaps(tokenize_prompt(base, "a cat on the snow"), tokenize_prompt(base, "A dog on the mountain"))
    assert pairs == [((2,), (2,)), ((5,), (5,))]
    with pytest.raises(UserError, match="has 5 and .* 3: use mode refine"):
        word_swaps(tokenize_prompt(base, "a cat on the snow"), tokenize_prompt(base, "a dog sitting"))


def test_swapped_prompts():
    prompt_tokens = tokenize_prompt(model(), "a cat and a Cat on a category")
    assert swap_words(prompt_tokens, [("cat", "red dog")]) == "a red dog and a red dog on a category"
    assert swap_words(prompt_tokens, [("cat", "fox"), ("a cat", "the cat")]) == "the cat and the cat on a category"
    with pytest.raises(UserError, match="the word 'dog' is not in the prompt"):
        swap_words(prompt_tokens, [("dog", "cat")])


def test_phrases_are_swapped_at_once_also_for_words_that_stand_there_already():
    source = tokenize_prompt(model(), "a cat and a dog")
    for swaps, target, expected in (
        ([("cat", "dog")], "a dog and a dog", [((2,), (2,))]),
        ([("cat", "dog"), ("dog", "cat")], "a dog and a cat", [((2,), (2,)), ((5,), (5,))]),
        ([("cat", "red fox")], "a red fox and a dog", [((2,), (2, 3))]),
        ([("a dog", "snow")], "a cat and snow", [((4, 5), (4,))]),
    ):
        assert swap_words(source, swaps) == target
        assert phrase_swaps(source, tokenize_prompt(model(), target), swaps) == expected
    with pytest.raises(UserError, match="replacing cat by fox in 'a cat and a dog' does not give 'a fox on the dog'"):
        phrase_swaps(source, tokenize_prompt(model(), "a fox on the dog"), [("cat", "fox")])


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        ("a cat and a dog", "a red cat and a dog", [((2,), (2,))]),
        ("a cat and a cat", "a cat and a red cat", [((5,), (5,))]),
        ("a cat on the snow", "a cat on the red blue snow", [((5,), (5,)), ((6,), (5,))]),
        ("a cat", "a cat sitting on snow", []),  # nothing behind it
        ("a cat and a dog", "a fox and a dog", []),  # swapped, not put in
        ("a photo of a cat", "a red blue of a cat", []),
        ("a cat in snow", "a cat sitting in snow", []),  # "in" is no noun
        ("cat on snow", "the cat on snow", []),  # an article is no adjective
    ],
)
def test_dpl_c67_adjectives_find_their_noun(source, target, expected):
    base = model()
    assert adjective_bindings(tokenize_prompt(base, source), tokenize_prompt(base, target)) == expected


@pytest.mark.parametrize(
    ("source", "target", "bound"),
    [
        ("a red cat", "a fluffy red cat", {"fluffy": "cat"}),
        ("a photo cat", "a red photo cat", {"red": "photo cat"}),
        ("a cat and a dog", "a cat and a red fluffy dog", {"red": "dog", "fluffy": "dog"}),
        ("a cat", "a cat in red snow", {}),
        ("a cat, a dog", "a cat, a red dog", {"red": "dog"}),
    ],
)
def test_an_adjective_is_bound_to_its_noun_and_not_to_the_next_word(source, target, bound):
    base = tiny("sd1")
    old, new = tokenize_prompt(base, source), tokenize_prompt(base, target)
    expected = [(new.find(word)[0], old.find(noun)[0]) for word, noun in bound.items()]
    assert adjective_bindings(old, new) == expected
