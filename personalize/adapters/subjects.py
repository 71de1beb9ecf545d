"""Concepts to be learned, by their tokens and class phrases, as the options name them.

Pure: no library.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from personalize.errors import UserError

TOKEN = re.compile(r"<[a-z0-9][a-z0-9-]*>")


@dataclass(frozen=True)
class Subject:
    """A concept to be learned: its token, its number of vectors, and its class phrase ("cat", "coffee cup").

    In prompts the class phrase follows the token: "a <cup1> coffee cup".  UserError for a token or phrase of another
    form, or for other than 1 to 16 vectors.
    """

    token: str
    noun: str
    vectors: int = 1

    def __post_init__(self) -> None:
        if not TOKEN.fullmatch(self.token):
            raise UserError(
                f"{self.token!r} cannot be a token: write it like <my-cat>, in angle brackets, of small letters, "
                "digits and hyphens, so that no other word contains it"
            )
        if not self.noun.strip() or TOKEN.search(self.noun):
            raise UserError(f"token {self.token} needs a class phrase of plain words, e.g. {self.token} cat")
        if not 1 <= self.vectors <= 16:
            raise UserError(f"token {self.token}: 1 to 16 vectors are possible, got {self.vectors}")

    @staticmethod
    def of(phrase: str, vectors: int = 1) -> Subject:
        """The subject of a phrase such as "<cup1> coffee cup"."""
        token, _, noun = " ".join(phrase.split()).partition(" ")
        return Subject(token, noun, vectors)

    @property
    def phrase(self) -> str:
        return f"{self.token} {self.noun}"


def default_prompt(subjects: Sequence[Subject]) -> str:
    """`photo of a <a> cat and <b> dog`, the template of the released code."""
    return "photo of a " + " and ".join(subject.phrase for subject in subjects)


def read_subjects(
    concepts: Sequence[str], modifier_token: str | None, prompt: str | None, vectors: int = 1
) -> tuple[Subject, ...]:
    """Subjects from phrases "<cat1> cat", or from tokens "<cat1>+<dog1>" and the word after each in `prompt`."""
    if concepts and modifier_token:
        raise UserError("give either concepts or modifier_token, not both")
    if modifier_token is None:
        return tuple(Subject.of(phrase, vectors) for phrase in concepts)
    subjects = []
    for token in modifier_token.split("+"):
        following = _words_after(token, prompt or "")
        if len(following) != 1 or (prompt or "").count(token) != 1:
            raise UserError(f"instance_prompt {prompt!r} must say {token} once, and after it what it is: {token} cat")
        subjects.append(Subject(token, following[0], vectors))
    return tuple(subjects)


def _words_after(token: str, text: str) -> list[str]:
    """The word after each `token` in `text`, without punctuation."""
    return re.findall(rf"{re.escape(token)}\s+(\w[\w-]*)", text)


def read_trigger(option: str, captions: Sequence[str]) -> Subject:
    """The subject of "<rex> dog", or of "<rex>" and the word after it in the first of `captions` that says it.

    Raises:
        UserError: no token, no word that says what it is, or a caption that does not say the token.
    """
    token, _, noun = " ".join(option.split()).partition(" ")
    for caption in captions:
        if token not in caption:
            raise UserError(
                f"the caption {caption!r} does not say {token}: write it where it names the subject, e.g. "
                f"'a photo of a {token} {noun or 'dog'}'"
            )
    following = [after for caption in captions for after in _words_after(token, caption)]
    if not noun and not following and TOKEN.fullmatch(token):
        raise UserError(f"say what {token} is: --instance_token '{token} dog', or the word after it in a caption")
    return Subject(token, noun or (following or [""])[0])


def check_named(prompt: str, subjects: Sequence[Subject]) -> None:
    """UserError unless the words of `prompt` name each subject once, and no two subjects share a token.

    The tokenizer of the base decides in the end (see `locate_subjects`); this is what can be said without one.
    """
    tokens = [subject.token for subject in subjects]
    for token in tokens:
        if tokens.count(token) > 1:
            raise UserError(f"the token {token} is given twice: every concept needs a token of its own")
    text = " ".join(prompt.split()).lower()
    for subject in subjects:
        count = len(re.findall(rf"{re.escape(subject.phrase.lower())}(?!\w)", text))
        if count != 1 or text.count(subject.token) != 1:
            how = "none" if count == 0 else "more than one"
            raise UserError(f"there must be one “{subject.phrase}” in the prompt, there is {how}: {prompt!r}")
