"""Words of prompts as they are written on a command line, `cat=dog` or `fluffy=3`.  This module imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from personalize.errors import UserError
from personalize.models.ranges import LARGEST_WORD_WEIGHT
from personalize.models.words import places_of, require_phrase, words_of


def pair(text: str, form: str = "old=new, for example cat=dog") -> tuple[str, str]:
    """ "cat=dog" → ("cat", "dog"); `form` is what should have been written."""
    old, _, new = (part.strip() for part in text.partition("="))
    if not old or not new:
        raise UserError(f"{text!r}: write {form}")
    return old, new


def local_words(text: str) -> tuple[str, str]:
    """ "cat=dog" → ("cat", "dog"), "cat" → ("cat", "cat"): a word of the source, and one of the target."""
    return pair(text if "=" in text else f"{text}={text}", "one word, or old=new, for example cat=dog")


def weight(text: str) -> tuple[str, float]:
    """ "fluffy=3" → ("fluffy", 3.0)."""
    word, _, factor = text.rpartition("=")
    try:
        if word.strip() and abs(number := float(factor)) <= LARGEST_WORD_WEIGHT:  # not of NaN either
            return word.strip(), number
        raise ValueError
    except ValueError:
        limits = f"a factor from {-LARGEST_WORD_WEIGHT} to {LARGEST_WORD_WEIGHT}"
        raise UserError(f"{text!r}: write word=factor, for example fluffy=3, with {limits}") from None


def check_words(config: Any) -> None:
    """UserError for a word that `edit PHOTO` is to swap, weigh or look for, and that is not in its prompt.

    What --swap makes of the source is not known here: of that, only what is swapped is looked for.
    """
    for old, _ in map(pair, config.swap):
        require_phrase(old, config.source)
    targets = [] if config.swap else [text for text in config.target if text.strip()] or [config.source]
    for word, target in ((weight(text)[0], target) for text in config.weight for target in targets):
        require_phrase(word, target)
    p2p = config.controller == "p2p"  # with mutual attention the source has no prompt
    for old, new in map(local_words, config.local):
        if old != new and p2p:
            require_phrase(old, config.source)
        for target in targets if old != new else ():
            require_phrase(new, target)
        if old == new and p2p and targets:
            _require_in_one(old, [config.source, *targets])


def _require_in_one(word: str, prompts: Sequence[str]) -> None:
    """UserError, which names the first of them, if `word` is in none of the prompts."""
    if not any(places_of(word, words_of(prompt)) for prompt in prompts):
        require_phrase(word, prompts[0])
