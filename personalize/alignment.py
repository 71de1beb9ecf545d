"""Which tokens of one prompt answer to which of another: words by character offsets, then maps from token to token.

Positions count from the start mark, 0; ids are one tokenizer's, padded or not.

References: Hertz et al., "Prompt-to-Prompt Image Editing with Cross Attention Control", arXiv 2208.01626, §3.3.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher, get_close_matches
from typing import cast

import torch
from diffusers.loaders import TextualInversionLoaderMixin
from torch import Tensor

from personalize.errors import UserError
from personalize.model import StableDiffusion

WORD = re.compile(r"<[^<>\s]+>(?:_\d+)?|[^\W_]+(?:['’-][^\W_]+)*|[^\w\s]|_")
FUNCTION_WORDS = frozenset(  # words that no adjective stands before
    "a an the and or nor but with without of in on at by to from into onto over under above below behind before beside "
    "near between through across around during for is are was were be as while that which who its his her their".split()
)
Places = int | Sequence[int]
Span = tuple[int, ...]
Swaps = Mapping[Places, Places] | Iterable[tuple[Places, Places]]


@dataclass(frozen=True)
class Word:
    """A word or punctuation mark of a prompt, in small letters, and the positions of its tokens."""

    text: str
    places: Span


@dataclass(frozen=True)
class Tokens:
    """A prompt as the text encoder reads it: `ids` with start and end mark, not padded, and its words."""

    text: str
    ids: tuple[int, ...]
    words: tuple[Word, ...]

    def find(self, phrase: str) -> list[Span]:
        """Positions of every occurrence of a word or phrase, in whatever case.  UserError if there is none."""
        wanted = list(_spelled(phrase))
        spelled = [word.text for word in self.words]
        starts = [at for at in range(len(spelled)) if wanted and spelled[at : at + len(wanted)] == wanted]
        if not starts:
            near = get_close_matches(phrase.lower(), spelled, 1, 0.5)
            hint = f"did you mean {near[0]}?" if near else f"its words are {', '.join(dict.fromkeys(spelled))}"
            raise UserError(f"the word {phrase!r} is not in the prompt {self.text!r}: {hint}")
        return [self.places(at, len(wanted)) for at in starts]

    def places(self, first: int, count: int) -> Span:
        """Positions of `count` words from number `first`."""
        return sum((word.places for word in self.words[first : first + count]), ())


def tokenize_prompt(model: StableDiffusion, text: str) -> Tokens:
    """`text` with learned tokens spelled out.  UserError if the text encoder would cut it off."""
    tokenizer = model.tokenizers[0]
    whole = TextualInversionLoaderMixin().maybe_convert_prompt([text], tokenizer)[0]
    read = tokenizer(whole, truncation=False, verbose=False, return_offsets_mapping=True)
    ids, most = read["input_ids"], tokenizer.model_max_length
    if len(ids) > most:
        raise UserError(
            f"the prompt has {len(ids)} tokens with its start and end mark, the text encoder reads {most}: shorten "
            f"{text if len(text) < 60 else text[:57] + '…'!r}"
        )
    offsets, words = read["offset_mapping"], []
    for match in WORD.finditer(whole):
        places = [at for at, (low, high) in enumerate(offsets) if low < match.end() and high > match.start()]
        if places:
            words.append(Word(match.group().lower(), tuple(places)))
    return Tokens(text, tuple(ids), tuple(words))


def replacement_mapper(source_ids: Sequence[int], target_ids: Sequence[int], swaps: Swaps) -> Tensor:
    """M (l_source, l_target) with A′ = A_source M, for words that are swapped for words.

    A swap of m source for n target pieces goes piece by piece if m = n; else every source piece gives 1/n to every
    target piece, so that a column sums to m/n.  Behind a swap target position j answers to source position j − (n − m),
    at the end clamped into the padding.

    Args:
        swaps: (positions in the source, positions in the target) of each swapped word, one position or several.

    Raises:
        ValueError: swaps that overlap, or lie out of order.
    """
    pairs = cast(Iterable[tuple[Places, Places]], swaps.items() if isinstance(swaps, Mapping) else swaps)
    ordered = sorted((_span(source), _span(target)) for source, target in pairs)
    matrix = torch.zeros(len(source_ids), len(target_ids))
    here = there = 0  # where the unchanged stretch begins, in the target and in the source
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
    """For each target id the position of its equal in the source, −1 where inserted; and alphas, 1 where there is one.

    Needleman–Wunsch: match +1, mismatch −1, gap 0; traced back from the end, ties prefer an insertion, then a deletion.
    Padding (what both end in, repeated, if they are of one length) maps to itself.
    """
    source, target = _unpadded(source_ids, target_ids)
    score = [[0] * (len(target) + 1) for _ in range(len(source) + 1)]
    for i, a in enumerate(source, 1):
        for j, b in enumerate(target, 1):
            score[i][j] = max(score[i][j - 1], score[i - 1][j], score[i - 1][j - 1] + (1 if a == b else -1))
    found, i, j = list(range(len(target_ids))), len(source), len(target)
    while j:
        if score[i][j] == score[i][j - 1]:
            j -= 1
            found[j] = -1
        elif score[i][j] == score[i - 1][j]:
            i -= 1
        else:
            i, j = i - 1, j - 1
            found[j] = i
    mapper = torch.tensor(found)
    return mapper, (mapper >= 0).float()


def word_swaps(source: Tokens, target: Tokens) -> list[tuple[Span, Span]]:
    """Words that differ, pair by pair, as `replacement_mapper` takes them.  UserError unless there are equally many."""
    if len(source.words) != len(target.words):
        raise UserError(
            f"replacing needs as many words in both prompts, {source.text!r} has {len(source.words)} and "
            f"{target.text!r} {len(target.words)}: use mode refine, or say what is swapped for what"
        )
    pairs = zip(source.words, target.words, strict=True)
    return [(old.places, new.places) for old, new in pairs if old.text != new.text]


def swap_words(source: Tokens, swaps: Sequence[tuple[str, str]]) -> str:
    """The source prompt with every occurrence of each old phrase as the new one, all at once.

    Raises:
        UserError: a phrase that is not there.
    """
    for old, _ in swaps:
        source.find(old)
    known = [(_spelled(old), new) for old, new in _longest_first(swaps)]
    words, parts, at, end = list(WORD.finditer(source.text)), [], 0, 0
    while at < len(words):
        here = [word.group().lower() for word in words[at:]]
        old, new = next(((o, n) for o, n in known if tuple(here[: len(o)]) == o), ((here[0],), words[at].group()))
        parts += [source.text[end : words[at].start()], new]
        at, end = at + len(old), words[at + len(old) - 1].end()
    return "".join([*parts, source.text[end:]])


def phrase_swaps(source: Tokens, target: Tokens, swaps: Sequence[tuple[str, str]]) -> list[tuple[Span, Span]]:
    """Every occurrence of each swapped phrase and its place in the target, as `replacement_mapper` takes them.

    Raises:
        UserError: a phrase that is not there, or a target that differs from the source by more than the swaps.
    """
    for old, new in swaps:
        source.find(old)
        target.find(new)
    pairs = [(_spelled(old), _spelled(new)) for old, new in _longest_first(swaps)]
    ours, theirs = ([word.text for word in tokens.words] for tokens in (source, target))
    found, i, j = [], 0, 0
    while i < len(ours) and j < len(theirs):
        for old, new in pairs:
            if tuple(ours[i : i + len(old)]) == old and tuple(theirs[j : j + len(new)]) == new:
                found.append((source.places(i, len(old)), target.places(j, len(new))))
                i, j = i + len(old), j + len(new)
                break
        else:
            if ours[i] != theirs[j]:
                break
            i, j = i + 1, j + 1
    if (i, j) != (len(ours), len(theirs)):
        said = ", ".join(f"{old} by {new}" for old, new in swaps)
        raise UserError(f"replacing {said} in {source.text!r} does not give {target.text!r}: swap all that differs")
    return found


def adjective_bindings(source: Tokens, target: Tokens) -> list[tuple[Span, Span]]:
    """(positions of a word put in before a word of the source, that word's positions in the source).

    A noun phrase got longer: nothing of the source went away there, and neither word is a preposition, conjunction,
    article or the like.
    """
    matcher = SequenceMatcher(None, [w.text for w in source.words], [w.text for w in target.words], autojunk=False)
    found = []
    for kind, low, _, first, last in matcher.get_opcodes():
        if kind != "insert" or low >= len(source.words):
            continue
        noun, added = source.words[low], target.words[first:last]
        plain = all(word.text[0].isalnum() and word.text not in FUNCTION_WORDS for word in (*added, noun))
        if plain:
            found += [(word.places, noun.places) for word in added]
    return found


def _spelled(phrase: str) -> tuple[str, ...]:
    return tuple(match.group().lower() for match in WORD.finditer(phrase))


def _longest_first(swaps: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    return sorted(swaps, key=lambda pair: -len(_spelled(pair[0])))


def _span(places: Places) -> Span:
    return (places,) if isinstance(places, int) else tuple(places)


def _unpadded(source: Sequence[int], target: Sequence[int]) -> tuple[Sequence[int], Sequence[int]]:
    runs = [_run(ids) for ids in (source, target)]
    if len(source) != len(target) or not len(source) or source[-1] != target[-1] or min(runs) < 2:
        return source, target
    return source[: len(source) - runs[0] + 1], target[: len(target) - runs[1] + 1]


def _run(ids: Sequence[int]) -> int:
    """How often the last id stands at the end."""
    return next((at for at, number in enumerate(reversed(ids)) if number != ids[-1]), len(ids))
