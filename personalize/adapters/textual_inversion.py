"""Learned tokens (textual inversion): new tokens in the tokenizers, with embeddings beside the text encoders' own.

    E(id) = rows[id − first new id]  if id is new,  else the frozen table's row        rows (n, d) fp32, one per vector

A concept is written as its token, such as `<cat1>`.  Further vectors of a token are `<cat1>_1`, `<cat1>_2`, …, which
are inserted behind it in prompts, as stock diffusers pipelines do.  The new ids are those that
`load_textual_inversion` would give in the same order.

SDXL's pooled vector is that of the first end token, as in the programs that load SDXL from single files.  An encoder
whose configuration says `eos_token_id: 2` pools at the highest id instead, which would be a learned token's: two
prompts that begin alike would have one pooled vector.

References: Gal et al., "An Image is Worth One Word", arXiv 2208.01618.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from personalize.adapters.subjects import Subject
from personalize.errors import UserError
from personalize.models.config import TEXT_ENCODERS
from personalize.models.offloading import embedding_device
from personalize.models.stable_diffusion import StableDiffusion
from personalize.models.token_ids import text_places, written_out
from personalize.randomness import generator

METHOD_ENTRIES = {"ktn": "ktn", "pll": "pll", "ucd": "ucd</w>"}  # in CLIP's vocabulary: 42170, 47629 and 43514
Rows = Mapping[str, Tensor]  # by text encoder, (n, d)


@dataclass(frozen=True)
class SubjectPositions:
    """Positions of a subject among the text encoder's l tokens: of its token's vectors, and of its class phrase."""

    modifier: tuple[int, ...]
    noun: tuple[int, ...]


class TokenEmbedding(nn.Module):
    """An embedding layer that gives the new `ids` the rows of `weight` (n, d), and all other ids those of `base`.

    `base` is the text encoder's own embedding layer, unchanged; only `weight` can be trained.
    """

    ids: Tensor

    def __init__(self, base: nn.Module, ids: Sequence[int], rows: Tensor, *, trainable: bool = False) -> None:
        super().__init__()
        self.base = base
        self.weight = nn.Parameter(rows.detach().float().clone(), requires_grad=trainable)
        self.register_buffer("ids", torch.tensor(ids), persistent=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Embeddings (b, l, d) of ids (b, l)."""
        matches = input_ids[..., None] == self.ids  # (b, l, n)
        new = matches.any(-1)
        plain = self.base(input_ids.masked_fill(new, 0))
        return torch.where(new[..., None], embedding(matches.int().argmax(-1), self.weight).to(plain.dtype), plain)


def vocabulary_entries(token: str, vectors: int) -> list[str]:
    """The vocabulary entries of a token of several vectors, as diffusers names them: <cat1>, <cat1>_1, …"""
    return [token, *(f"{token}_{number}" for number in range(1, vectors))]


def initial_embeddings(model: StableDiffusion, subject: Subject, initializer: str = "class") -> dict[str, Tensor]:
    """Initial embeddings (vectors, d) of a token, by text encoder: each the mean embedding of `initializer`'s tokens.

    Args:
        initializer: a word, or "class" for the subject's class phrase.  The method's words ktn, pll and ucd stand for
            entries of CLIP's vocabulary that its tokenizer does not give: it reads `ktn` as two tokens.

    Raises:
        UserError: the initializer is empty.
    """
    text = subject.noun if initializer == "class" else initializer
    embeddings = {}
    for name, tokenizer, encoder in zip(TEXT_ENCODERS, model.tokenizers, model.text_encoders, strict=False):
        own = None if initializer == "class" else _vocabulary_id(tokenizer, text)
        ids = tokenizer(text, add_special_tokens=False).input_ids if own is None else [own]
        if not ids:
            raise UserError(f"token {subject.token} cannot start from the word {text!r}, which is empty")
        table = encoder.get_input_embeddings()
        with torch.no_grad():
            row = table(torch.tensor([ids], device=next(table.parameters()).device))[0].float().mean(0)
        embeddings[name] = row.repeat(subject.vectors, 1)
    return embeddings


def _vocabulary_id(tokenizer: Any, word: str) -> int | None:
    """The id of the vocabulary entry that one of the method's words stands for; None for other words."""
    entry = METHOD_ENTRIES.get(word)
    return None if entry is None else tokenizer.get_vocab().get(entry)


def with_distinct_starts(concepts: Mapping[str, Rows], seed: int) -> dict[str, dict[str, Tensor]]:
    """`concepts` (token → rows), where rows equal to those of an earlier concept are moved a little from them.

    Noise of a quarter of the rows' own standard deviation is added, drawn by a generator keyed by `seed` and the token.
    Two concepts that started equal would get equal gradients from everything that does not tell them apart.
    """
    distinct: dict[str, dict[str, Tensor]] = {}
    for token, rows in concepts.items():
        moved = {}
        for name, start in rows.items():
            noise = torch.randn(start.shape, generator=generator(seed, f"start/{token}/{name}")).to(start)
            repeats = any(torch.equal(start[0], other[name][0]) for other in distinct.values())
            moved[name] = start + 0.25 * start.std() * noise if repeats else start
        distinct[token] = moved
    return distinct


@contextmanager
def installed_tokens(
    model: StableDiffusion, concepts: Mapping[str, Rows], *, trainable: bool = False
) -> Iterator[list[TokenEmbedding]]:
    """Run the body with the tokens of `concepts` (token → rows) added to the tokenizers and text encoders.

    Afterwards everything is as before; contexts may be nested.  Yields one `TokenEmbedding` per text encoder, which has
    the rows of all tokens in their order.  The tokenizers are copies, so that those of a pipeline are never altered.

    Raises:
        UserError: a token that the tokenizers already have, or rows that do not fit the text encoders.
    """
    if not concepts:
        yield []
        return
    check_new_tokens(model, concepts)
    tokenizers = model.tokenizers
    tables = [encoder.get_input_embeddings() for encoder in model.text_encoders]
    ends = [vars(module) for encoder in model.text_encoders for module in _pooling_at_highest(encoder)]
    try:
        for own in ends:
            own["eos_token_id"] = tokenizers[-1].eos_token_id
        model.tokenizers = tuple(copy.deepcopy(tokenizer) for tokenizer in tokenizers)
        wrapped = []
        names = TEXT_ENCODERS[: len(tables)]
        for name, tokenizer, encoder, table in zip(names, model.tokenizers, model.text_encoders, tables, strict=True):
            rows = _rows(concepts, name, encoder.config.hidden_size)
            entries = [word for token, tensor in rows.items() for word in vocabulary_entries(token, len(tensor))]
            tokenizer.add_tokens(entries)
            ids = tokenizer.convert_tokens_to_ids(entries)
            layer = TokenEmbedding(table, ids, torch.cat([*rows.values()]), trainable=trainable)
            layer.to(embedding_device(encoder), non_blocking=True)
            encoder.set_input_embeddings(layer)
            wrapped.append(layer)
        yield wrapped
    finally:
        model.tokenizers = tokenizers
        for own in ends:
            own["eos_token_id"] = 2
        for encoder, table in zip(model.text_encoders, tables, strict=True):
            encoder.set_input_embeddings(table)


def _pooling_at_highest(encoder: Any) -> list[Any]:
    """The modules of a text encoder that pool at the highest id, which transformers does for an `eos_token_id` of 2."""
    return [module for module in encoder.modules() if vars(module).get("eos_token_id") == 2]


def check_new_tokens(model: StableDiffusion, tokens: Mapping[str, Rows] | Sequence[str]) -> None:
    """UserError if a tokenizer already has one of `tokens`, or if two of them are equal; case is ignored.

    The entries of further vectors count too, if `tokens` has rows (token → encoder → rows): "<cat>_1" is one of <cat>.
    """
    entries = [*tokens]
    if isinstance(tokens, Mapping):
        sizes = {token: [len(part) for part in rows.values() if part.ndim == 2] for token, rows in tokens.items()}
        entries = [
            entry for token, counts in sizes.items() for entry in vocabulary_entries(token, max(counts, default=1))
        ]
    earlier: set[str] = set()
    for token in entries:
        if token.lower() in earlier:
            raise UserError(f"the token {token} is given twice: every concept needs a token of its own")
        earlier.add(token.lower())
    for tokenizer in model.tokenizers:
        known = tokenizer.get_vocab()
        added = {word.lower() for word in tokenizer.added_tokens_encoder}
        for token in entries:
            if token in known or f"{token}</w>" in known or token.lower() in added:
                raise UserError(
                    f"the token {token} is already a word of this base or of an adapter in it: choose another"
                )


def _rows(concepts: Mapping[str, Rows], name: str, width: int) -> dict[str, Tensor]:
    """Each token's rows for the text encoder `name`, checked against its embedding `width`."""
    fitting = {}
    for token, rows in concepts.items():
        if name not in rows or rows[name].ndim != 2 or rows[name].shape[1] != width:
            shape = tuple(rows[name].shape) if name in rows else "none"
            raise UserError(
                f"token {token} has rows {shape} for the {name} of this base, which needs (n, {width}): "
                "it was learned on another base model"
            )
        fitting[token] = rows[name]
    return fitting


def token_state(layers: Sequence[TokenEmbedding], subjects: Sequence[Subject]) -> dict[str, dict[str, Tensor]]:
    """The tokens' embeddings, by token and text encoder: copies (vectors, d) in fp32 on the CPU."""
    learned: dict[str, dict[str, Tensor]] = {subject.token: {} for subject in subjects}
    for name, layer in zip(TEXT_ENCODERS, layers, strict=False):
        parts = layer.weight.detach().to("cpu", torch.float32, copy=True).split([s.vectors for s in subjects])
        for subject, part in zip(subjects, parts, strict=True):
            learned[subject.token][name] = part.clone()
    return learned


def locate_subjects(model: StableDiffusion, text: str, subjects: Sequence[Subject]) -> list[SubjectPositions]:
    """The token positions of each of `subjects` in `text`, which must name it exactly once: token, then class phrase.

    Raises:
        UserError: a phrase is missing or repeated; the message shows the tokens of `text`.
    """
    first, *others = [[_positions(tokenizer, text, subject) for subject in subjects] for tokenizer in model.tokenizers]
    if any(positions != first for positions in others):
        raise UserError(f"the two tokenizers of this base split {text!r} into tokens at different places")
    return first


def _positions(tokenizer: Any, text: str, subject: Subject) -> SubjectPositions:
    """The positions of one subject by one tokenizer; UserError as in `locate_subjects`."""
    entries = vocabulary_entries(subject.token, subject.vectors)
    ids = tokenizer(written_out(tokenizer, text), add_special_tokens=False, verbose=False).input_ids
    modifier = tokenizer.convert_tokens_to_ids(entries)
    noun = tokenizer(subject.noun, add_special_tokens=False).input_ids
    starts = [at for at in range(len(ids)) if ids[at : at + len(modifier)] == modifier]
    behind = [at for at in starts if ids[at + len(modifier) : at + len(modifier) + len(noun)] == noun]
    if len(starts) != 1 or len(behind) != 1:
        how = "no" if not behind else "more than one"
        raise UserError(
            f"there must be one “{subject.phrase}” in the prompt, there is {how}: {_pieces(tokenizer, ids)}"
        )
    first, middle, end = (behind[0] + count for count in (0, len(modifier), len(modifier) + len(noun)))
    places = text_places(tokenizer, ids)
    return SubjectPositions(tuple(places[first:middle]), tuple(places[middle:end]))


def _pieces(tokenizer: Any, ids: Sequence[int]) -> str:
    """The tokens of a text in readable form: "a · <cat1> · cat"."""
    special = set(tokenizer.all_special_ids)
    pieces = tokenizer.convert_ids_to_tokens([number for number in ids if number not in special])
    return " · ".join(piece.removesuffix("</w>") for piece in pieces)
