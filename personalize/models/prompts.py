"""Prompts as words and as tokens: which positions a word takes, and a prompt worded like a caption."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from personalize.models.stable_diffusion import StableDiffusion
from personalize.models.token_ids import chunks_of, further_vectors, text_places, written_out
from personalize.models.words import WORD, composed, places_of, require_phrase, words_of

Positions = int | Sequence[int]
Span = tuple[int, ...]


@dataclass(frozen=True)
class Word:
    """A word or punctuation mark of a prompt in lower case, and the positions of its tokens.

    A learned token of several vectors is one word, with the positions of all of them.
    """

    text: str
    positions: Span


@dataclass(frozen=True)
class Tokens:
    """A tokenized prompt of k chunks of 75 tokens, see `token_ids`.

    ids: of its tokens between one start and one end token, without padding and the marks between chunks.
    places: the position of each of `ids` among the k·77 that the text encoder reads.
    words: with positions among these k·77.
    length: k·77.
    """

    text: str
    ids: tuple[int, ...]
    places: tuple[int, ...]
    words: tuple[Word, ...]
    length: int

    def find(self, phrase: str) -> list[Span]:
        """Positions of every occurrence of a word or phrase, ignoring case; UserError if there is none."""
        starts = require_phrase(phrase, self.text, [word.text for word in self.words])
        return [self.positions_of(at, len(words_of(phrase))) for at in starts]

    def has(self, phrase: str) -> bool:
        """Whether a word or phrase occurs in it, ignoring case."""
        return bool(places_of(phrase, [word.text for word in self.words]))

    def positions_of(self, first: int, count: int) -> Span:
        """Positions of the tokens of `count` words, the first of which is number `first`."""
        return sum((word.positions for word in self.words[first : first + count]), ())


def tokenize_prompt(model: StableDiffusion, text: str) -> Tokens:
    """Tokenize a prompt of any length, its accents composed, learned tokens of several vectors spelled out."""
    tokenizer, text = model.tokenizers[0], composed(text)
    whole = written_out(tokenizer, text)
    read = tokenizer(whole, truncation=False, verbose=False, return_offsets_mapping=True)
    ids, offsets = read["input_ids"], read["offset_mapping"]
    inner = text_places(tokenizer, ids[1:-1])
    places, words, further = (0, *inner, inner[-1] + 1 if inner else 1), [], further_vectors(tokenizer)
    for match in WORD.finditer(whole):
        inside = [at for at, (low, high) in enumerate(offsets) if low < match.end() and high > match.start()]
        spelled, positions = match.group().lower(), tuple(places[at] for at in inside)
        if inside and words and all(ids[at] in further for at in inside):
            before = words.pop()
            spelled, positions = before.text, tuple(dict.fromkeys((*before.positions, *positions)))
        if inside:
            words.append(Word(spelled, positions))
    length = chunks_of(tokenizer, inner) * tokenizer.model_max_length
    return Tokens(text, tuple(ids), places, tuple(words), length)


_NEUTRAL, _ANY = ("photo", "photograph", "picture", "image"), ("picture", "image")
_PREFIX = re.compile(
    r"(an?|the) (?P<medium>photo|photograph|picture|image|drawing|painting|sketch|render|rendering|icon|sticker|cartoon"
    r"|illustration|sculpture|statue|close-up|portrait) of ",
    re.IGNORECASE,
)


def align_prompt(prompt: str, caption: str) -> str:
    """`prompt` with the caption's beginning, so that the same token positions of the two mean the same.

    A source embedding is edited token by token, and in "a dog" and "a photo of a dog" the token "dog" has different
    positions.  So a beginning such as "a photo of" is taken from the caption, or removed if the caption has none.  A
    medium that only the prompt names, as in "a drawing of a dog", is part of the edit and stays.

    References: Zhang et al., "Forgedit", arXiv 2309.10556 (the official code copies "A photo of").
    """
    prompt = prompt.strip()
    of_caption, of_prompt = _PREFIX.match(caption.strip()), _PREFIX.match(prompt)
    replaceable = _NEUTRAL if of_caption is None or _neutral(of_caption) else _ANY
    if not prompt or (of_prompt is not None and of_prompt["medium"].lower() not in replaceable):
        return prompt
    rest = prompt[of_prompt.end() :] if of_prompt else prompt
    if of_caption is not None:
        return of_caption[0] + rest
    return align_prompt(rest, caption) if of_prompt else rest  # what is left may begin so too: aligned twice is once


def _neutral(prefix: re.Match[str]) -> bool:
    """Whether the prefix names no medium but photography."""
    return prefix["medium"].lower() in _NEUTRAL
