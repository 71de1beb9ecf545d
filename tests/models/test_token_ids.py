"""Prompts as token ids: what the encoder cannot read of them is said."""

from __future__ import annotations

import warnings

import pytest
import torch

from personalize.errors import Notice
from personalize.models.token_ids import padded_ids
from tests.support.tiny import tiny


def test_words_that_are_cut_off_are_named() -> None:
    """What stands behind token 77 was dropped without a word."""
    tokenizer = tiny("sd1").tokenizers[0]
    long = "a " * 70
    with warnings.catch_warnings():
        warnings.simplefilter("error", Notice)
        whole = padded_ids(tokenizer, [long + "cat"])
    room = 75 - len(tokenizer(long, add_special_tokens=False).input_ids)
    with pytest.warns(Notice, match="tokens and the text encoder reads 75: “(z ?)+” is cut off"):
        cut = padded_ids(tokenizer, [long + "z " * (room + 3)])
    assert whole.shape == cut.shape == (1, 77) and int(cut[0, -1]) == tokenizer.eos_token_id


def test_tokens_that_nobody_taught_the_base_are_named() -> None:
    tokenizer = tiny("sd1").tokenizers[0]
    with pytest.warns(Notice, match="no adapter has taught this base <my-cat>"):
        before = padded_ids(tokenizer, ["a <my-cat> cat"])
    tokenizer.add_tokens(["<my-cat>"])
    with warnings.catch_warnings():
        warnings.simplefilter("error", Notice)
        assert not torch.equal(padded_ids(tokenizer, ["a <my-cat> cat"]), before)
