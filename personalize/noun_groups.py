"""Which tokens of a prompt say which thing: nouns, found or named by the user, as positions and vocabulary entries.

A group is one thing: all pieces of a word, all places where the word stands, and its synonyms.  Its map is the mean
over its positions, so that repeated nouns and synonyms are never pulled apart.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from personalize.alignment import Tokens, tokenize_prompt
from personalize.errors import UserError
from personalize.model import StableDiffusion
from personalize.nouns import depicted_nouns


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
        UserError: no noun at all, a word that is not in the prompt, one given twice, or a prompt of over 77 tokens.
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
    return [(word,) for word in dict.fromkeys(noun.text.lower() for noun in depicted_nouns(prompt))]


def _group(model: StableDiffusion, prompt: str, words: tuple[str, ...]) -> NounGroup:
    read = tokenize_prompt(model, prompt)
    places = sorted({place for word in words for place in _places(read, word)})
    encoded = [model.ids(tokenizer, [prompt])[0].tolist() for tokenizer in model.tokenizers]
    ids = tuple(tuple(dict.fromkeys(one[place] for place in places)) for one in encoded)
    return NounGroup(words, tuple(places), ids)


def _places(read: Tokens, word: str) -> list[int]:
    """Every occurrence of `word`; of a learned token with all its vectors, `<cat1>_1` and so on."""
    found = [place for span in read.find(word) for place in span]
    vectors = [w.places for w in read.words if re.fullmatch(rf"{re.escape(word.lower())}_\d+", w.text)]
    return [*found, *(place for span in vectors for place in span)]
