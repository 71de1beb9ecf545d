"""Which tokens of a prompt say which thing: nouns, found or named by the user, as positions and vocabulary entries.

A group is one thing: all pieces of a word, all places where the word stands, and its synonyms.  Its map is the mean
over its positions, so that repeated nouns and synonyms are never pulled apart.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from diffusers.loaders import TextualInversionLoaderMixin
from torch import Tensor

from personalize.errors import UserError
from personalize.model import StableDiffusion
from personalize.nouns import things


@dataclass(frozen=True)
class NounGroup:
    """One thing of the prompt: its `words`, their `positions` among the l tokens, and those tokens' `ids`.

    `ids` has one tuple for each text encoder, without repetitions.
    """

    words: tuple[str, ...]
    positions: tuple[int, ...]
    ids: tuple[tuple[int, ...], ...]

    @property
    def name(self) -> str:
        return "/".join(self.words)


def noun_groups(model: StableDiffusion, prompt: str, named: Sequence[str] = ()) -> list[NounGroup]:
    """The things that `prompt` shows: those `named`, or else its nouns; synonyms are joined by "=": "kitten=cat".

    Raises:
        UserError: no noun at all, a word that is not in the prompt, one given twice, or one cut off at the end.
    """
    asked = [tuple(phrase.split("=")) for phrase in named] or _found(prompt)
    if not asked:
        raise UserError(f"no noun was found in {prompt!r}: name what it shows with --nouns")
    every = [word.lower() for words in asked for word in words]
    if len(set(every)) < len(every):
        raise UserError(f"a noun is named twice in {', '.join(every)}: each thing once, synonyms joined by =")
    return [_group(model, prompt, words) for words in asked]


def group_maps(attention: Tensor, groups: Sequence[NounGroup]) -> Tensor:
    """Maps (k, h, w) of the groups from `attention` (h, w, l): the mean over each group's positions."""
    return torch.stack([attention[..., list(group.positions)].mean(-1) for group in groups])


def _found(prompt: str) -> list[tuple[str, ...]]:
    """Nouns of `prompt`, each once, whatever its case."""
    return [(word,) for word in dict.fromkeys(noun.text.lower() for noun in things(prompt))]


def _group(model: StableDiffusion, prompt: str, words: tuple[str, ...]) -> NounGroup:
    cuts = [_cut(tokenizer, prompt, words) for tokenizer in model.tokenizers]
    positions = tuple(sorted({position for position, _ in cuts[0]}))
    if any(tuple(sorted({position for position, _ in cut})) != positions for cut in cuts):
        raise UserError(f"the two tokenizers of this base cut {prompt!r} at different places")
    return NounGroup(words, positions, tuple(tuple(dict.fromkeys(number for _, number in cut)) for cut in cuts))


def _cut(tokenizer: Any, prompt: str, words: tuple[str, ...]) -> list[tuple[int, int]]:
    """(position, id) of every piece of every occurrence of `words`."""
    text = TextualInversionLoaderMixin().maybe_convert_prompt([prompt], tokenizer)[0]
    coded = tokenizer(text, return_offsets_mapping=True, truncation=False, verbose=False)
    found = []
    for word in words:
        spans = [match.span() for match in _pattern(word).finditer(text)]
        if not spans:
            raise UserError(f"the word {word!r} is not in the prompt {prompt!r}: {_nearest(word, prompt)}")
        for position, (start, end) in enumerate(coded.offset_mapping):
            if start < end and any(low <= start and end <= high for low, high in spans):
                found.append((position, coded.input_ids[position]))
        if found and found[-1][0] > tokenizer.model_max_length - 2:
            raise UserError(f"{word!r} is cut off, the text encoder reads {tokenizer.model_max_length} tokens: shorten")
    return found


def _pattern(word: str) -> re.Pattern[str]:
    """`word` as a whole, whatever its case and spaces; a learned token with all its vectors."""
    spaced = r"\s+".join(re.escape(part) for part in word.split())
    tail = r"(?:_\d+)?" if word.endswith(">") else ""
    return re.compile(rf"(?<!\w){spaced}{tail}(?!\w)", re.IGNORECASE)


def _nearest(word: str, prompt: str) -> str:
    known = [noun.text for noun in things(prompt)] + prompt.split()
    near = get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else "name words as they stand there"
