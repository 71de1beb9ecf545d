"""Group the tokens of a prompt by the object that they name: nouns, found in the prompt or named by the user.

A group holds all tokens that name one object: all tokens of a word, all its occurrences, and its synonyms; but not the
"dog" of a "dog house" that is another object. Its attention map is the mean over its tokens, so that dynamic prompts do
not push repeated nouns and synonyms apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from personalize.editing.dynamic_prompt_learning.nouns import depicted_nouns
from personalize.errors import UserError
from personalize.models.prompts import tokenize_prompt
from personalize.models.stable_diffusion import StableDiffusion
from personalize.models.token_ids import padded_ids
from personalize.models.words import composed


@dataclass(frozen=True)
class NounGroup:
    """The tokens of a prompt that name one object.

    words: the noun and its synonyms. positions: indices of their tokens among the l tokens of the prompt.
    ids: for each text encoder the ids of these tokens, without repetitions.
    """

    words: tuple[str, ...]
    positions: tuple[int, ...]
    ids: tuple[tuple[int, ...], ...]

    @property
    def name(self) -> str:
        return "/".join(self.words)


def noun_groups(model: StableDiffusion, prompt: str, named: Sequence[str] = ()) -> list[NounGroup]:
    """The objects that `prompt` names: those in `named`, where "=" joins synonyms ("kitten=cat"), or else its nouns.

    Raises:
        UserError: there is no noun, or a word is not in the prompt or was given twice.
    """
    objects = [tuple(composed(phrase).split("=")) for phrase in named] or _nouns_of(prompt)
    if not objects:
        raise UserError(f"no noun was found in {prompt!r}: name what it shows with --nouns")
    every = [word.lower() for words in objects for word in words]
    if len(set(every)) < len(every):
        raise UserError(f"a noun is named twice in {', '.join(every)}: name each object once, and join synonyms by =")
    return [_group(model, prompt, words, [word for other in objects if other != words for word in other])
            for words in objects]  # fmt: skip


def group_maps(attention: Tensor, groups: Sequence[NounGroup]) -> Tensor:
    """Attention maps (k, h, w) of k groups, from `attention` (h, w, l): the mean over each group's tokens."""
    each = ([attention[..., position] for position in group.positions] for group in groups)  # no indices to copy
    return torch.stack([torch.stack(own, -1).mean(-1) for own in each])


def _nouns_of(prompt: str) -> list[tuple[str, ...]]:
    """The nouns of `prompt` in lower case, each once."""
    return [(word,) for word in dict.fromkeys(noun.text.lower() for noun in depicted_nouns(composed(prompt)))]


def _group(model: StableDiffusion, prompt: str, words: tuple[str, ...], others: Sequence[str]) -> NounGroup:
    """The group of `words`; within a longer one of `others` they count only if they stand nowhere else."""
    tokens = tokenize_prompt(model, prompt)
    every, longer = ([span for word in some for span in tokens.find(word)] for some in (words, others))
    own = [span for span in every if not any(set(span) < set(other) for other in longer)]
    positions = sorted({position for span in own or every for position in span})
    encoded = [padded_ids(tokenizer, [prompt])[0].tolist() for tokenizer in model.tokenizers]
    ids = tuple(tuple(dict.fromkeys(one[position] for position in positions)) for one in encoded)
    return NounGroup(words, tuple(positions), ids)
