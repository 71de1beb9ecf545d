"""The token ids of prompts, with a Notice of what a text encoder cannot read of them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from personalize.errors import Notice

TOKEN = re.compile(r"<[^<>\s|]+>")  # a learned token as it is written; CLIP's own marks have bars: <|endoftext|>


def padded_ids(tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Token ids (b, l) of `texts`, padded and cut to the encoder's l positions; on the CPU.

    Learned tokens of several vectors are written out, as stock pipelines do.  Words that are cut off, and tokens that
    nothing has taught the tokenizer, are said in a Notice.
    """
    from diffusers.loaders import TextualInversionLoaderMixin

    length = tokenizer.model_max_length
    texts = TextualInversionLoaderMixin().maybe_convert_prompt(list(texts), tokenizer)
    for text, ids in zip(texts, tokenizer(texts, truncation=False, verbose=False).input_ids, strict=True):
        if len(ids) > length:
            rest = tokenizer.decode(ids[length - 1 : -1]).replace("</w>", " ").strip()
            warnings.warn(
                f"the prompt has {len(ids) - 2} tokens and the text encoder reads {length - 2}: “{rest}” is cut off; "
                "make the prompt shorter", Notice, stacklevel=2,
            )  # fmt: skip
        for token in TOKEN.findall(text):
            if tokenizer.convert_tokens_to_ids(token) == tokenizer.unk_token_id:
                warnings.warn(
                    f"no adapter has taught this base {token}: it is read as the letters {' '.join(token)}", Notice,
                    stacklevel=2,
                )  # fmt: skip
    return tokenizer(
        texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    ).input_ids  # fmt: skip
