"""Prompts of any length as token ids: chunks of 75 tokens, each of which a text encoder reads between its own marks.

    <start> 75 tokens <end> · <start> 75 tokens <end> · … · <start> the rest <end> padding            k · 77 positions

Each chunk is encoded by itself, and the embeddings stand one after the other, as A1111, ComfyUI and sd-scripts have
it.  Chunks are filled to the last token, as by sd-scripts; only the vectors of a learned token are kept together.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from personalize.errors import Notice, UserError
from personalize.io.json_files import SURROGATE

TOKEN = re.compile(r"<[^<>\s|]+>")  # a learned token as it is written; CLIP's own marks have bars: <|endoftext|>
WEIGHTED = re.compile(r"[(\[][^()\[\]]*[^\W\d_][^()\[\]]*: ?(?:\d(?:\.\d*)?|\.\d+)[)\]]")  # (cat:1.2), as A1111 has it
VECTOR = re.compile(r"(.+)_\d+")  # a further vector of a learned token, as diffusers names them: <cat1>_1


def padded_ids(tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Token ids (b, k·77) of `texts` in as many chunks as the longest needs; on the CPU.

    Learned tokens of several vectors are written out, as stock pipelines do.  Tokens that nothing has taught the
    tokenizer, and weights in brackets, are said in a Notice.

    Raises:
        UserError: a text with halves of surrogate pairs, as Python reads bytes that are no UTF-8.
    """
    for text in filter(SURROGATE.search, texts):
        raise UserError(f"{text!r} holds bytes that are no UTF-8: write the text again, in UTF-8")
    texts = [written_out(tokenizer, text) for text in texts]
    for token in (token for text in texts for token in TOKEN.findall(text)):
        if tokenizer.convert_tokens_to_ids(token) == tokenizer.unk_token_id:
            warnings.warn(
                f"no adapter has taught this base {token}: it is read as the letters {' '.join(token)}", Notice,
                stacklevel=2,
            )  # fmt: skip
    for weighted in (match[0] for text in texts for match in WEIGHTED.finditer(text)):
        warnings.warn(
            f"{weighted} is read as it stands: weights in brackets, as A1111 and ComfyUI have them, mean nothing here",
            Notice, stacklevel=2,
        )  # fmt: skip
    rows = [tokenizer(text, add_special_tokens=False, verbose=False).input_ids for text in texts]
    placed = [text_places(tokenizer, row) for row in rows]
    chunks = max((chunks_of(tokenizer, places) for places in placed), default=1)
    empty = tokenizer("", padding="max_length", max_length=tokenizer.model_max_length).input_ids
    ids = torch.tensor([empty * chunks] * len(texts)).view(len(texts), -1)
    for out, row, places in zip(ids, rows, placed, strict=True):
        out[places] = torch.tensor(row, dtype=out.dtype)
        ends = {place // len(empty): place + 1 for place in places}  # behind the last token of each chunk
        out[list(ends.values())] = tokenizer.eos_token_id
    return ids


def written_out(tokenizer: Any, text: str) -> str:
    """`text` with the further vectors of its learned tokens behind them, "<cat1> <cat1>_1", as diffusers does it.

    Case does not count in a prompt: "<Cat1>" is written as the token was learned, which is how diffusers looks for it.
    """
    from diffusers.loaders import TextualInversionLoaderMixin

    def tokenize(text: str) -> list[str]:  # transformers would warn of long texts, which are cut for no encoder here
        return tokenizer.tokenize(text, verbose=False)

    for token in tokenizer.added_tokens_encoder.keys() - {*tokenizer.all_special_tokens}:
        text = re.sub(re.escape(token), lambda _, token=token: token, text, flags=re.IGNORECASE)
    quiet: Any = SimpleNamespace(tokenize=tokenize, added_tokens_encoder=tokenizer.added_tokens_encoder)
    return TextualInversionLoaderMixin().maybe_convert_prompt([text], quiet)[0]


def equal_ids(tokenizers: Sequence[Any], texts: Sequence[str]) -> list[Tensor]:
    """The ids (b, k·77) of `texts` for each of a base's tokenizers, padded by empty chunks to the same k."""
    ids = [padded_ids(tokenizer, texts) for tokenizer in tokenizers]
    length = max(part.shape[1] for part in ids)
    for number, (tokenizer, part) in enumerate(zip(tokenizers, ids, strict=True)):
        if missing := (length - part.shape[1]) // tokenizer.model_max_length:
            ids[number] = torch.cat([part, padded_ids(tokenizer, [""]).repeat(len(texts), missing)], 1)
    return ids


def text_places(tokenizer: Any, ids: Sequence[int]) -> list[int]:
    """The position among k·77 of each token of a prompt: `ids` are its tokens without start and end mark."""
    length, further = tokenizer.model_max_length, further_vectors(tokenizer)
    at, places = 1, []
    for number, token in enumerate(ids):
        vectors = 1  # of the learned token that begins here, which one chunk shall hold
        while token not in further and number + vectors < len(ids) and ids[number + vectors] in further:
            vectors += 1
        if at % length + min(vectors, length - 2) > length - 1:
            at = (at // length + 1) * length + 1
        places.append(at)
        at += 1
    return places


def chunks_of(tokenizer: Any, places: Sequence[int]) -> int:
    """The number k of chunks that tokens at `places` take; 1 of the empty text."""
    return places[-1] // tokenizer.model_max_length + 1 if places else 1


def further_vectors(tokenizer: Any) -> set[int]:
    """Ids of the vectors of learned tokens that follow their first: they stay in its chunk."""
    added = tokenizer.added_tokens_encoder
    return {number for text, number in added.items() if (name := VECTOR.fullmatch(text)) and name[1] in added}
