"""Align the tokens of two prompts: find words, and build matrices that carry attention maps from source to target.

Words are matched to tokens by character offsets. Positions are indices of tokens, beginning with the start token at 0.
Token ids are those of the first tokenizer, padded or not.

References: Hertz et al., "Prompt-to-Prompt Image Editing with Cross Attention Control", arXiv 2208.01626, §3.3.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterable, Mapping, Sequence
from difflib import SequenceMatcher
from itertools import accumulate
from typing import cast

import torch
from torch import Tensor

from personalize.editing.dynamic_prompt_learning.nouns import nouns
from personalize.errors import UserError
from personalize.models.prompts import Positions, Span, Tokens
from personalize.models.words import WORD, words_of

FUNCTION_WORDS = frozenset(  # words that no adjective describes
    "a an the and or nor but with without of in on at by to from into onto over under above below behind before beside "
    "near between through across around during for is are was were be as while that which who its his her their".split()
)
Swaps = Mapping[Positions, Positions] | Iterable[tuple[Positions, Positions]]


def replacement_mapper(source_ids: Sequence[int], target_ids: Sequence[int], swaps: Swaps) -> Tensor:
    """The matrix M (l_source, l_target) in A′ = A_source M, for prompts in which words were swapped for words.

    A word of m tokens that is swapped for one of n tokens is carried token by token if m = n. Otherwise each source
    token gives 1/n to each target token, so that a column of M sums to m/n. After such a swap, target position j
    corresponds to source position j − (n − m), at most to the last one, which is padding.

    Args:
        swaps: (positions in the source, positions in the target) of each swapped word, one position or several.

    Raises:
        ValueError: swaps overlap, or are in another order in the target.
    """
    pairs = cast(Iterable[tuple[Positions, Positions]], swaps.items() if isinstance(swaps, Mapping) else swaps)
    ordered = sorted((_span(source), _span(target)) for source, target in pairs)
    matrix = torch.zeros(len(source_ids), len(target_ids))
    here = there = 0  # start of the unchanged tokens before the next swap, in the target and in the source
    for source, target in [*ordered, (None, None)]:
        end = len(target_ids) if target is None else target[0]
        if end < here or (source is not None and source[0] - there != end - here):
            raise ValueError(f"swaps {ordered} overlap, or what lies between them has not the same length in both")
        for offset, position in enumerate(range(here, end)):
            matrix[min(there + offset, len(source_ids) - 1), position] = 1
        if source is None or target is None:
            return matrix
        if len(source) == len(target):
            matrix[list(source), list(target)] = 1
        else:
            matrix[torch.tensor(source)[:, None], torch.tensor(target)] = 1 / len(target)
        here, there = target[-1] + 1, source[-1] + 1
    return matrix


def refinement_mapper(source_ids: Sequence[int], target_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """For each target token its source position, −1 if it was inserted, (l,); and alphas (l,), 1 if it has one.

    Needleman–Wunsch alignment with match +1, mismatch −1 and gap 0. Tracing back from the end, ties prefer an
    insertion, then a deletion. Padding, the token that both sequences repeat at their end if they are equally long,
    maps to itself.
    """
    source, target = _unpadded(source_ids, target_ids)
    score = [[0] * (len(target) + 1) for _ in range(len(source) + 1)]
    for i, a in enumerate(source, 1):
        for j, b in enumerate(target, 1):
            score[i][j] = max(score[i][j - 1], score[i - 1][j], score[i - 1][j - 1] + (1 if a == b else -1))
    positions, i, j = list(range(len(target_ids))), len(source), len(target)
    while j:
        if score[i][j] == score[i][j - 1]:
            j -= 1
            positions[j] = -1
        elif score[i][j] == score[i - 1][j]:
            i -= 1
        else:
            i, j = i - 1, j - 1
            positions[j] = i
    mapper = torch.tensor(positions)
    return mapper, (mapper >= 0).float()


def word_swaps(source: Tokens, target: Tokens) -> list[tuple[Span, Span]]:
    """Positions of the words that differ, as `replacement_mapper` takes them; UserError if the numbers differ."""
    if len(source.words) != len(target.words):
        raise UserError(
            f"replacing needs as many words in both prompts, {source.text!r} has {len(source.words)} and "
            f"{target.text!r} {len(target.words)}: use mode refine, or say what is swapped for what"
        )
    pairs = zip(source.words, target.words, strict=True)
    return [(old.positions, new.positions) for old, new in pairs if old.text != new.text]


def swap_words(source: Tokens, swaps: Sequence[tuple[str, str]]) -> str:
    """The source prompt with every occurrence of each old phrase replaced by the new one, all at the same time.

    Raises:
        UserError: a phrase is not in the source.
    """
    for old, _ in swaps:
        source.find(old)
    replacements = [(words_of(old), new) for old, new in _longest_first(swaps)]
    words, parts, at, end = list(WORD.finditer(source.text)), [], 0, 0
    while at < len(words):
        here = [word.group().lower() for word in words[at:]]
        unchanged = (here[0],), words[at].group()
        old, new = next(((o, n) for o, n in replacements if tuple(here[: len(o)]) == o), unchanged)
        parts += [source.text[end : words[at].start()], new]
        at, end = at + len(old), words[at + len(old) - 1].end()
    return "".join([*parts, source.text[end:]])


def phrase_swaps(source: Tokens, target: Tokens, swaps: Sequence[tuple[str, str]]) -> list[tuple[Span, Span]]:
    """Positions of every swapped phrase in source and target, as `replacement_mapper` takes them.

    Raises:
        UserError: a phrase is not in its prompt, or the target differs from the source by more than the swaps.
    """
    for old, new in swaps:
        source.find(old)
        target.find(new)
    pairs = [(words_of(old), words_of(new)) for old, new in _longest_first(swaps)]
    source_words, target_words = ([word.text for word in tokens.words] for tokens in (source, target))
    spans, i, j = [], 0, 0
    while i < len(source_words) and j < len(target_words):
        for old, new in pairs:
            if tuple(source_words[i : i + len(old)]) == old and tuple(target_words[j : j + len(new)]) == new:
                spans.append((source.positions_of(i, len(old)), target.positions_of(j, len(new))))
                i, j = i + len(old), j + len(new)
                break
        else:
            if source_words[i] != target_words[j]:
                break
            i, j = i + 1, j + 1
    if (i, j) != (len(source_words), len(target_words)):
        asked = ", ".join(f"{old} by {new}" for old, new in swaps)
        raise UserError(f"replacing {asked} in {source.text!r} does not give {target.text!r}: swap all that differs")
    return spans


def differ_word_for_word(source: Tokens, target: Tokens) -> bool:
    """Whether words of the source were only exchanged for as many others, none put in and none dropped.

    Words are compared by content: "a cat on the grass" and "a red cat on grass" are equally long, but "red" was put in
    and "the" dropped.
    """
    changes = _word_changes(source, target)
    return all(high - low == last - first for _, low, high, first, last in changes)


def adjective_bindings(source: Tokens, target: Tokens) -> list[tuple[Span, Span]]:
    """Words that the target inserts before a noun: (their positions in the target, the noun's in the source).

    The noun is the next one of the target after the inserted words, with nothing but further describing words between:
    "car" for "big" in "a big red car", "teddy bear" for "brown" in "a brown teddy bear". A word counts if no word of
    the source was removed there, the noun is in the source too, and no function word (preposition, conjunction,
    article) or punctuation is among the words up to the noun.
    """
    compounds = _noun_words(target)
    kept = {j: i for kind, low, high, first, _ in _word_changes(source, target, equal=True) if kind == "equal"
            for i, j in zip(range(low, high), range(first, first + high - low), strict=True)}  # fmt: skip
    bindings = []
    for kind, _, _, first, last in _word_changes(source, target):
        noun = next((words for words in compounds if words.start >= last), None)
        if kind != "insert" or noun is None or not set(noun) <= set(kept):
            continue
        if all(word.text[0].isalnum() and word.text not in FUNCTION_WORDS for word in target.words[first : noun.start]):
            places = sum((source.words[kept[at]].positions for at in noun), ())
            bindings += [(word.positions, places) for word in target.words[first:last]]
    return bindings


def _word_changes(source: Tokens, target: Tokens, *, equal: bool = False) -> list[tuple[str, int, int, int, int]]:
    """`difflib` opcodes that turn the words of `source` into those of `target`, those of equal words only if asked."""
    matcher = SequenceMatcher(None, [w.text for w in source.words], [w.text for w in target.words], autojunk=False)
    return [change for change in matcher.get_opcodes() if equal or change[0] != "equal"]


def _noun_words(tokens: Tokens) -> list[range]:
    """The numbers of the words of each noun of the prompt, compounds as one."""
    text = " ".join(word.text for word in tokens.words)
    ends = list(accumulate(len(word.text) + 1 for word in tokens.words))  # of each word, with the space after it
    return [range(bisect(ends, noun.start), bisect(ends, noun.end) + 1) for noun in nouns(text)]


def _longest_first(swaps: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    return sorted(swaps, key=lambda pair: -len(words_of(pair[0])))


def _span(positions: Positions) -> Span:
    return (positions,) if isinstance(positions, int) else tuple(positions)


def _unpadded(source: Sequence[int], target: Sequence[int]) -> tuple[Sequence[int], Sequence[int]]:
    """Both token sequences with one token of padding at the end, if they are padded to one length."""
    repeats = [_trailing_repeats(ids) for ids in (source, target)]
    if len(source) != len(target) or not len(source) or source[-1] != target[-1] or min(repeats) < 2:
        return source, target
    return source[: len(source) - repeats[0] + 1], target[: len(target) - repeats[1] + 1]


def _trailing_repeats(ids: Sequence[int]) -> int:
    """How often the last id is repeated at the end, itself included."""
    return next((at for at, number in enumerate(reversed(ids)) if number != ids[-1]), len(ids))
