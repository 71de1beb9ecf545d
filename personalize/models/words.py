"""The words of a prompt, without a tokenizer; read before torch is imported."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from difflib import get_close_matches

from personalize.errors import UserError

WORD = re.compile(r"<[^<>\s]+>(?:_\d+)?|[^\W_]+(?:['’-][^\W_]+)*|[^\w\s]|_")


def words_of(phrase: str) -> tuple[str, ...]:
    """The words of a phrase in lower case, their accents composed."""
    return tuple(match.group().lower() for match in WORD.finditer(composed(phrase)))


def composed(text: str) -> str:
    """`text` with each letter and its accent as one character (NFC), as CLIP reads it: macOS and PDFs part the two."""
    return unicodedata.normalize("NFC", text)


def places_of(phrase: str, words: Sequence[str]) -> list[int]:
    """The numbers of the `words` of a prompt at which a phrase begins, ignoring case."""
    wanted, spelled = list(words_of(phrase)), list(words)
    return [at for at in range(len(spelled)) if wanted and spelled[at : at + len(wanted)] == wanted]


def require_phrase(phrase: str, text: str, words: Sequence[str] | None = None) -> list[int]:
    """`places_of` a word or phrase in the prompt `text`, whose `words` may be known; UserError if it is not in it."""
    spelled = words_of(text) if words is None else words
    if places := places_of(phrase, spelled):
        return places
    near = get_close_matches(phrase.lower(), spelled, 1, 0.6)
    hint = f"did you mean {near[0]}?" if near else f"its words are {', '.join(dict.fromkeys(spelled))}"
    raise UserError(f"the word {phrase!r} is not in the prompt {composed(text)!r}: {hint}")
