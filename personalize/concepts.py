"""Learned tokens: new words of the tokenizers with rows of their own beside the text encoders' embedding tables.

    E(id) = rows[id − first new id]  if id is new,  else the frozen table's row          rows (n, d) fp32, one a vector

A concept is called by its token, such as `<cat1>`; with several vectors the further ones are `<cat1>_1`, `<cat1>_2`, …
and are put in behind the token, as stock diffusers pipelines do.  Ids are those that `load_textual_inversion` would
give in the same order, so that SDXL encoders which pool at the highest id pool where a stock pipeline pools.

References: Gal et al., "An Image is Worth One Word", arXiv 2208.01618.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.loaders import TextualInversionLoaderMixin
from torch import Tensor, nn
from torch.nn.functional import embedding

from personalize.errors import UserError
from personalize.model import StableDiffusion

ENCODERS = ("text_encoder", "text_encoder_2")
TOKEN = re.compile(r"<[a-z0-9][a-z0-9-]*>")
Rows = Mapping[str, Tensor]  # by text encoder, (n, d)


@dataclass(frozen=True)
class Subject:
    """A token to be learned, the class phrase that follows it in prompts ("cat", "coffee cup"), its vectors."""

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


@dataclass(frozen=True)
class Places:
    """Positions among the encoder's l tokens: of the learned token's vectors, and of its class phrase."""

    modifier: tuple[int, ...]
    noun: tuple[int, ...]


class ConceptRows(nn.Module):
    """The embedding table `base`, unchanged, and beside it the rows of new `ids`; only `weight` (n, d) can learn."""

    ids: Tensor

    def __init__(self, base: nn.Module, ids: Sequence[int], rows: Tensor, *, trainable: bool = False) -> None:
        super().__init__()
        self.base = base
        self.weight = nn.Parameter(rows.detach().float().clone(), requires_grad=trainable)
        self.register_buffer("ids", torch.tensor(ids), persistent=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Embeddings (b, l, d) of ids (b, l)."""
        same = input_ids[..., None] == self.ids  # (b, l, n)
        mine = same.any(-1)
        plain = self.base(input_ids.masked_fill(mine, 0))
        return torch.where(mine[..., None], embedding(same.int().argmax(-1), self.weight).to(plain.dtype), plain)


def words(token: str, vectors: int) -> list[str]:
    """The vocabulary entries of a token, as diffusers names them."""
    return [token, *(f"{token}_{number}" for number in range(1, vectors))]


def initial_rows(model: StableDiffusion, subject: Subject, initializer: str = "class") -> dict[str, Tensor]:
    """Rows to start from, by text encoder: each the mean of the rows of the word `initializer`, or of the class phrase.

    Raises:
        UserError: the initializer is empty.
    """
    text = subject.noun if initializer == "class" else initializer
    found = {}
    for name, tokenizer, encoder in zip(ENCODERS, model.tokenizers, model.text_encoders, strict=False):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        if not ids:
            raise UserError(f"token {subject.token} cannot start from the word {text!r}, which is empty")
        table = encoder.get_input_embeddings()
        with torch.no_grad():
            row = table(torch.tensor([ids], device=model.device))[0].float().mean(0)
        found[name] = row.repeat(subject.vectors, 1)
    return found


@contextmanager
def installed(
    model: StableDiffusion, concepts: Mapping[str, Rows], *, trainable: bool = False
) -> Iterator[list[ConceptRows]]:
    """Run the body with `concepts` (token → rows) in the tokenizers and text encoders; afterwards all is as before.

    Yields one `ConceptRows` for each text encoder, with the rows of all tokens in their order.  Contexts go inside one
    another.  The tokenizers are copies, so that those of a pipeline are never altered.

    Raises:
        UserError: a token that is already a word here, or rows that do not fit the text encoders.
    """
    if not concepts:
        yield []
        return
    check_new(model, concepts)
    tokenizers = model.tokenizers
    tables = [encoder.get_input_embeddings() for encoder in model.text_encoders]
    try:
        model.tokenizers = tuple(copy.deepcopy(tokenizer) for tokenizer in tokenizers)
        wrapped = []
        names = ENCODERS[: len(tables)]
        for name, tokenizer, encoder, table in zip(names, model.tokenizers, model.text_encoders, tables, strict=True):
            rows = _rows(concepts, name, encoder.config.hidden_size)
            spelled = [word for token, tensor in rows.items() for word in words(token, len(tensor))]
            tokenizer.add_tokens(spelled)
            ids = tokenizer.convert_tokens_to_ids(spelled)
            layer = ConceptRows(table, ids, torch.cat([*rows.values()]), trainable=trainable).to(model.device)
            encoder.set_input_embeddings(layer)
            wrapped.append(layer)
        yield wrapped
    finally:
        model.tokenizers = tokenizers
        for encoder, table in zip(model.text_encoders, tables, strict=True):
            encoder.set_input_embeddings(table)


def check_new(model: StableDiffusion, tokens: Mapping[str, Any] | Sequence[str]) -> None:
    """UserError unless no tokenizer knows any of `tokens` yet, in whatever case, and all differ."""
    seen: set[str] = set()
    for token in tokens:
        if token.lower() in seen:
            raise UserError(f"the token {token} is given twice: every concept needs a token of its own")
        seen.add(token.lower())
    for tokenizer in model.tokenizers:
        known = tokenizer.get_vocab()
        added = {word.lower() for word in tokenizer.added_tokens_encoder}
        for token in tokens:
            if token in known or f"{token}</w>" in known or token.lower() in added:
                raise UserError(
                    f"the token {token} is already a word of this base or of an adapter in it: choose another"
                )


def _rows(concepts: Mapping[str, Rows], name: str, width: int) -> dict[str, Tensor]:
    found = {}
    for token, rows in concepts.items():
        if name not in rows or rows[name].ndim != 2 or rows[name].shape[1] != width:
            shape = tuple(rows[name].shape) if name in rows else "none"
            raise UserError(
                f"token {token} has rows {shape} for the {name} of this base, which needs (n, {width}): "
                "it was learned on another base model"
            )
        found[token] = rows[name]
    return found


def state(layers: Sequence[ConceptRows], subjects: Sequence[Subject]) -> dict[str, dict[str, Tensor]]:
    """What was learned, by token and text encoder: copies (vectors, d) in fp32 on the CPU."""
    found: dict[str, dict[str, Tensor]] = {subject.token: {} for subject in subjects}
    for name, layer in zip(ENCODERS, layers, strict=False):
        parts = layer.weight.detach().to("cpu", torch.float32, copy=True).split([s.vectors for s in subjects])
        for subject, part in zip(subjects, parts, strict=True):
            found[subject.token][name] = part.clone()
    return found


def locate(model: StableDiffusion, text: str, subjects: Sequence[Subject]) -> list[Places]:
    """Where `text` says each of `subjects`: its token and right behind it its class phrase, exactly once.

    Raises:
        UserError, showing how the text is cut into tokens: a phrase is missing, repeated, or cut off at the end.
    """
    found = [[_place(tokenizer, text, subject) for subject in subjects] for tokenizer in model.tokenizers]
    if any(places != found[0] for places in found):
        raise UserError(f"the two tokenizers of this base cut {text!r} at different places")
    return found[0]


def _place(tokenizer: Any, text: str, subject: Subject) -> Places:
    spelled = words(subject.token, subject.vectors)
    whole = TextualInversionLoaderMixin().maybe_convert_prompt([text], tokenizer)
    ids = tokenizer(whole, truncation=False, verbose=False).input_ids[0]
    modifier = tokenizer.convert_tokens_to_ids(spelled)
    noun = tokenizer(subject.noun, add_special_tokens=False).input_ids
    starts = [at for at in range(len(ids)) if ids[at : at + len(modifier)] == modifier]
    behind = [at for at in starts if ids[at + len(modifier) : at + len(modifier) + len(noun)] == noun]
    if len(starts) != 1 or len(behind) != 1:
        how = "no" if not behind else "more than one"
        raise UserError(
            f"there must be one “{subject.phrase}” in the prompt, there is {how}: {_pieces(tokenizer, ids)}"
        )
    first, middle, end = (behind[0] + count for count in (0, len(modifier), len(modifier) + len(noun)))
    if end > tokenizer.model_max_length - 1:
        raise UserError(
            f"“{subject.phrase}” is cut off, the text encoder reads {tokenizer.model_max_length} tokens: "
            f"shorten the prompt {_pieces(tokenizer, ids)}"
        )
    return Places(tuple(range(first, middle)), tuple(range(middle, end)))


def _pieces(tokenizer: Any, ids: Sequence[int]) -> str:
    """The tokens of a text as people read them: "a · <cat1> · cat"."""
    special = set(tokenizer.all_special_ids)
    shown = tokenizer.convert_ids_to_tokens([number for number in ids if number not in special])
    return " · ".join(piece.removesuffix("</w>") for piece in shown)
