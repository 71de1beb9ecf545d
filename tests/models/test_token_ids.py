"""Prompts of any length as token ids, and their embeddings chunk by chunk."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from torch import Tensor

from personalize.errors import Notice, UserError
from personalize.models.prompts import tokenize_prompt
from personalize.models.stable_diffusion import StableDiffusion
from personalize.models.token_ids import padded_ids, text_places
from tests.support.tiny import NAMES, tiny

LONG = "a red cat on the beach " * 14 + "and my dog"  # 87 tokens: 75 and 12


def independent(model: StableDiffusion, text: str, chunks: int) -> tuple[Tensor, Tensor | None]:
    """The embeddings as A1111, ComfyUI and sd-scripts make them, written out with transformers alone."""
    encoders, pooled = [], None
    for tokenizer, encoder in zip(model.tokenizers, model.text_encoders, strict=True):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        rows = []
        for number in range(chunks):
            part = [tokenizer.bos_token_id, *ids[75 * number : 75 * number + 75], tokenizer.eos_token_id]
            out = encoder(torch.tensor([part + [tokenizer.pad_token_id] * (77 - len(part))]), output_hidden_states=True)
            rows.append(out.hidden_states[-2] if model.family == "sdxl" else out.last_hidden_state)
            pooled = getattr(out, "text_embeds", None) if number == 0 else pooled
        encoders.append(torch.cat(rows, 1))
    return torch.cat(encoders, -1), pooled


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("text", "chunks"), [("a cat", 1), (LONG, 2), (LONG, 3), (LONG + LONG, 3), ("cat " * 75, 1)])
def test_long_prompts_equal_what_other_programs_make_of_them(name: str, text: str, chunks: int) -> None:
    """What stood behind token 77 was dropped.  1e-6: encoders round differently in a batch of several chunks."""
    model = tiny(name)
    found = model.padded(model.prompts([text]), 77 * chunks)
    embeds, pooled = independent(model, text, chunks)
    torch.testing.assert_close(found.embeds, embeds, atol=1e-6, rtol=0)
    if pooled is not None:
        torch.testing.assert_close(found.pooled, pooled, atol=1e-6, rtol=0)


def test_a_short_prompt_beside_a_long_one_is_padded_by_empty_chunks() -> None:
    model = tiny("sdxl")
    both, short = model.prompts(["a cat", LONG]), model.prompts(["a cat"])
    assert both.embeds.shape == (2, 154, 72)
    torch.testing.assert_close(both[:1].embeds, model.padded(short, 154).embeds, atol=1e-6, rtol=0)
    torch.testing.assert_close(both.embeds[:1, 77:], model.prompts([""]).embeds, atol=1e-6, rtol=0)


def test_transformers_does_not_warn_of_the_length() -> None:
    """It would say that indexing errors follow; it keeps a note that it has warned."""
    model = tiny("sd1")
    model.prompts([LONG])
    tokenize_prompt(model, LONG)
    assert len(model.tokens(LONG)) == 87 and not model.tokenizers[0].deprecation_warnings


def test_no_token_is_lost_and_each_chunk_has_its_marks() -> None:
    tokenizer = tiny("sd1").tokenizers[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error", Notice)
        ids = padded_ids(tokenizer, [LONG, "a cat"]).view(2, 2, 77)
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert (ids[:, :, 0] == start).all() and ids[0, 0, 76] == end and ids[0, 1, 13] == end
    assert ids[1, 1].tolist() == [start] + [end] * 76
    whole = tokenizer(LONG, add_special_tokens=False).input_ids
    assert ids[0, 0, 1:76].tolist() + ids[0, 1, 1:13].tolist() == whole


def test_the_vectors_of_a_learned_token_stay_in_one_chunk() -> None:
    """Companion: a token of one vector takes the 75th place."""
    tokenizer = tiny("sd1").tokenizers[0]
    tokenizer.add_tokens(["<cat1>", "<cat1>_1", "<cat1>_2", "<one_1>"])
    cat, one = tokenizer.convert_tokens_to_ids(["<cat1>", "<cat1>_1", "<cat1>_2"]), 5
    assert text_places(tokenizer, [one] * 74 + cat + [one])[-5:] == [74, 78, 79, 80, 81]
    assert text_places(tokenizer, [one] * 72 + cat + [one])[-4:] == [73, 74, 75, 78]
    assert text_places(tokenizer, [one] * 74 + [tokenizer.convert_tokens_to_ids("<one_1>")])[-1:] == [75]


def test_tokens_that_nobody_taught_the_base_are_named() -> None:
    tokenizer = tiny("sd1").tokenizers[0]
    with pytest.warns(Notice, match="no adapter has taught this base <my-cat>"):
        before = padded_ids(tokenizer, ["a <my-cat> cat"])
    tokenizer.add_tokens(["<my-cat>"])
    with warnings.catch_warnings():
        warnings.simplefilter("error", Notice)
        after = padded_ids(tokenizer, ["a <my-cat> cat"])
        assert not torch.equal(after, before)
        assert torch.equal(padded_ids(tokenizer, ["A <My-Cat> cat"]), after), "case does not count"


def test_weights_in_brackets_are_said_to_be_text() -> None:
    tokenizer = tiny("sd1").tokenizers[0]
    for weighted in ("(cat:1.2)", "[cat:0.5]", "(a red cat: 1)", "(cat:.5)"):
        with pytest.warns(Notice, match=re.escape(f"{weighted} is read as it stands: weights in brackets")):
            padded_ids(tokenizer, [f"a {weighted} on the beach"])
    with warnings.catch_warnings():
        warnings.simplefilter("error", Notice)
        padded_ids(tokenizer, ["a (cat) in 16:9 (at 12:30), (16:9), [a cat], cat: 2", "((cat))"])


def test_bytes_that_are_no_text_are_refused() -> None:
    with pytest.raises(UserError, match=r"'caf\\udce9' holds bytes that are no UTF-8"):
        padded_ids(tiny("sd1").tokenizers[0], ["a cat", "caf\udce9"])
