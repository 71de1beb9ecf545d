"""Learned tokens: rows beside the table, positions in prompts, and agreement with stock pipelines."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from personalize.adapters.textual_inversion import (
    Subject,
    SubjectPositions,
    TokenEmbedding,
    check_new_tokens,
    initial_embeddings,
    installed_tokens,
    locate_subjects,
    token_state,
    with_distinct_starts,
)
from personalize.errors import UserError
from personalize.formats import textual_inversion_files
from personalize.models.loading import clip_tokenizer
from personalize.models.stable_diffusion import StableDiffusion
from personalize.training.config import MultiConceptConfig
from tests.support.tiny import tiny

CAT, DOG, FOX = Subject("<cat1>", "cat"), Subject("<dog1>", "dog"), Subject("<fox1>", "red fox", 2)
PROMPT = "photo of a <cat1> cat and <dog1> dog"


@pytest.fixture(scope="module")
def sd1() -> StableDiffusion:
    return tiny("sd1")


def drawn(model: StableDiffusion, *subjects: Subject, seed: int = 0) -> dict[str, dict[str, Tensor]]:
    """Rows that differ from all others."""
    rng = torch.Generator().manual_seed(seed)
    found = {subject.token: initial_embeddings(model, subject) for subject in subjects}
    return {t: {k: torch.randn(v.shape, generator=rng) for k, v in rows.items()} for t, rows in found.items()}


PREFIXES = ("", "a far away ", "very small ", "zoomed in ", "close up ")


@pytest.mark.parametrize("prefix", PREFIXES)
def test_disendiff_c_positions_behind_every_prefix(sd1: StableDiffusion, prefix: str) -> None:
    with installed_tokens(sd1, drawn(sd1, CAT, DOG)):
        cat, dog = locate_subjects(sd1, prefix + PROMPT, [CAT, DOG])
        first = 4 + len(sd1.tokens(prefix))  # BOS, photo, of, a
    assert cat == SubjectPositions((first,), (first + 1,)) and dog == SubjectPositions((first + 3,), (first + 4,))


def test_disendiff_c_swapped_order_three_concepts_and_phrases_of_several_tokens(sd1: StableDiffusion) -> None:
    with installed_tokens(sd1, drawn(sd1, CAT, DOG, FOX)):
        dog, cat = locate_subjects(sd1, "photo of a <dog1> dog and <cat1> cat", [DOG, CAT])
        assert (dog.modifier, cat.modifier) == ((4,), (7,))
        prompt = "a <fox1> red fox and <cat1> cat and a dog and <dog1> dog"
        cat, dog, fox = locate_subjects(sd1, prompt, [CAT, DOG, FOX])
        assert fox == SubjectPositions((2, 3), (4, 5)) and cat == SubjectPositions((7,), (8,))
        assert dog.modifier == (13,)
    model = tiny("sdxl")
    with installed_tokens(model, drawn(model, FOX)):
        assert locate_subjects(model, "a <fox1> red fox", [FOX]) == [SubjectPositions((2, 3), (4, 5))]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("photo of a <dog1> dog", "there is no: photo · of · a · <dog1> · dog"),
        ("a <cat1> fox", "there is no: a · <cat1> · fox"),
        ("a <cat1> cat and <cat1> cat", "more than one: a · <cat1> · cat · and · <cat1> · cat"),
    ],
)
def test_disendiff_c_missing_or_repeated_is_an_error_that_shows_the_tokens(
    sd1: StableDiffusion, text: str, message: str
) -> None:
    with installed_tokens(sd1, drawn(sd1, CAT, DOG)), pytest.raises(UserError, match=message):
        locate_subjects(sd1, text, [CAT])


def test_disendiff_c_a_subject_behind_the_first_75_tokens_is_found_in_its_chunk(sd1: StableDiffusion) -> None:
    """The vectors of a token are not torn apart: the first chunk keeps a position free."""
    with installed_tokens(sd1, drawn(sd1, CAT, FOX)):
        (cat,) = locate_subjects(sd1, "a cat and " * 25 + "<cat1> cat", [CAT])
        (fox,) = locate_subjects(sd1, "a cat " * 37 + "<fox1> red fox", [FOX])
    assert cat == SubjectPositions((78,), (79,)) and fox == SubjectPositions((78, 79), (80, 81))


def test_disendiff_c_companion_the_next_position_is_not_the_class_of_a_token_with_two_vectors(
    sd1: StableDiffusion,
) -> None:
    """Naive: the class is the position behind the token's first id."""
    with installed_tokens(sd1, drawn(sd1, FOX)):
        (place,) = locate_subjects(sd1, "a <fox1> red fox", [FOX])
    assert place.modifier[0] + 1 not in place.noun


def test_rows_begin_as_copies_and_leave_no_trace() -> None:
    model = tiny("sd1")
    tables, tokenizers = [e.get_input_embeddings() for e in model.text_encoders], model.tokenizers
    before = tables[0].weight.clone()
    with torch.no_grad():
        plain = model.prompts(["a cat on the beach", "a cat cat and dog"])
        start = {"<cat1>": initial_embeddings(model, CAT)}
        with pytest.raises(RuntimeError, match="stop"), installed_tokens(model, start):
            inside = model.prompts(["a cat on the beach", "a <cat1> cat and dog"])
            assert torch.equal(inside.embeds, plain.embeds)
            raise RuntimeError("stop")
        assert torch.equal(model.prompts(["a cat on the beach", "a cat cat and dog"]).embeds, plain.embeds)
    assert model.tokenizers is tokenizers and "<cat1>" not in tokenizers[0].get_vocab()
    assert [e.get_input_embeddings() for e in model.text_encoders] == tables
    assert torch.equal(tables[0].weight, before)


def test_only_the_rows_of_named_tokens_get_a_gradient() -> None:
    model = tiny("sd1")
    with installed_tokens(model, drawn(model, CAT, DOG), trainable=True) as (rows,):
        model.prompts(["a <cat1> cat"]).embeds.sum().backward()
        assert rows.weight.grad is not None and bool(rows.weight.grad[0].any()) and not bool(rows.weight.grad[1].any())
        learning = [name for name, p in model.text_encoders[0].named_parameters() if p.requires_grad]
        assert len(learning) == 1 and token_state([rows], [CAT, DOG])["<dog1>"]["text_encoder"].shape == (1, 32)


def test_contexts_go_inside_one_another() -> None:
    model = tiny("sd1")
    cats, dogs = drawn(model, CAT), drawn(model, DOG)
    with torch.no_grad(), installed_tokens(model, cats | dogs):
        both = model.prompts([PROMPT]).embeds
    with torch.no_grad(), installed_tokens(model, cats), installed_tokens(model, dogs):
        assert torch.equal(model.prompts([PROMPT]).embeds, both)
        with pytest.raises(UserError, match="already a word"):
            check_new_tokens(model, ["<cat1>"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Subject("cat1", "cat"), "angle brackets"),
        (lambda: Subject("<Cat1>", "cat"), "small letters"),
        (lambda: Subject("<cat1>", " "), "class phrase"),
        (lambda: Subject.of("<cat1> <cat1> cat"), "class phrase"),
        (lambda: Subject("<cat1>", "cat", 0), "1 to 16 vectors"),
        (lambda: check_new_tokens(tiny("sd1"), ["<a>", "<a>"]), "given twice"),
        (lambda: check_new_tokens(tiny("sd1"), ["<|endoftext|>"]), "already a word"),
        (lambda: check_new_tokens(tiny("sd1"), ["cat"]), "already a word"),
    ],
)
def test_tokens_that_would_collide_are_refused(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


def test_further_vectors_of_a_token_are_no_other_token() -> None:
    """`sks_1` is the second vector of `sks`: of two tokens with one entry the second was lost, or changed the first."""
    model, two, one = tiny("sd1"), {"text_encoder": torch.ones(2, 32)}, {"text_encoder": torch.zeros(1, 32)}
    with (
        pytest.raises(UserError, match="the token sks_1 is given twice"),
        installed_tokens(model, {"sks": two, "sks_1": one}),
    ):
        pass
    with installed_tokens(model, {"sks_1": one}):
        with pytest.raises(UserError, match="the token sks_1 is already a word"), installed_tokens(model, {"sks": two}):
            pass
        with torch.no_grad(), installed_tokens(model, {"sks": one}):  # of one vector it is in nobody's way
            model.prompts(["sks sks_1"])


def test_rows_of_another_base_are_refused_and_leave_no_trace() -> None:
    model, other = tiny("sd1"), tiny("sd2v")
    table = model.text_encoders[0].get_input_embeddings()
    with pytest.raises(UserError, match="learned on another base"), installed_tokens(model, drawn(other, CAT)):
        pass
    assert model.text_encoders[0].get_input_embeddings() is table


def stock(model: StableDiffusion, concepts: dict[str, dict[str, Tensor]], folder: Any) -> Any:
    """A stock pipeline of `model`'s parts, with the tokens read from the files that diffusers reads."""
    pipe = model.pipeline()
    for name, (token, encoder) in textual_inversion_files.token_file_names(concepts, "diffusers").items():
        assert encoder is not None
        path = folder / name
        path.write_bytes(
            textual_inversion_files.diffusers_file(
                textual_inversion_files.LearnedToken(token, concepts[token]), encoder
            )
        )
        ending = "_2" if encoder == "text_encoder_2" else ""
        parts = {"text_encoder": getattr(pipe, encoder), "tokenizer": getattr(pipe, f"tokenizer{ending}")}
        pipe.load_textual_inversion(str(path), token=token, **parts)
    return pipe


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
@pytest.mark.parametrize("eos", [None, 2])
def test_a_stock_pipeline_reads_prompts_as_we_do(name: str, eos: int | None, tmp_path: Any) -> None:
    """Except for the pooled vector of an encoder with eos_token_id 2, which diffusers takes at the learned token."""
    model, other = tiny(name), tiny(name)
    for encoder in (*model.text_encoders, *other.text_encoders) if eos else ():
        inner = getattr(encoder, "text_model", encoder)
        encoder.config.eos_token_id = inner.eos_token_id = eos
    concepts = drawn(model, CAT, FOX)
    text = "a <fox1> red fox and <cat1> cat"
    with torch.no_grad(), installed_tokens(model, concepts):
        ours = model.prompts([text])
    pipe = stock(other, concepts, tmp_path)
    theirs = pipe.encode_prompt(text, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    torch.testing.assert_close(ours.embeds, theirs[0], atol=1e-6, rtol=0)
    if name == "sdxl" and not eos:
        torch.testing.assert_close(ours.pooled, theirs[2], atol=1e-6, rtol=0)


def test_pooling_is_at_the_first_end_token_in_both_forms_of_an_sdxl_configuration() -> None:
    texts, pooled = ["a <cat1> cat on the beach", "a <cat1> cat in snow"], {}
    for eos in (None, 2):
        model = tiny("sdxl")
        for encoder in model.text_encoders if eos else ():
            inner = getattr(encoder, "text_model", encoder)
            encoder.config.eos_token_id = inner.eos_token_id = eos
        with torch.no_grad():
            before = model.prompts(["a cat"]).pooled
            with installed_tokens(model, drawn(model, CAT)):
                pooled[eos] = model.prompts(texts).pooled
            inner = getattr(model.text_encoders[1], "text_model", model.text_encoders[1])
            assert (inner.eos_token_id == 2) == bool(eos)  # as before
            assert torch.equal(model.prompts(["a cat"]).pooled, before)  # pyright: ignore[reportArgumentType]
    assert torch.equal(pooled[None], pooled[2])
    assert float((pooled[2][0] - pooled[2][1]).abs().max()) > 1e-2  # at the learned token they were bit-identical


def test_rows_work_for_any_table() -> None:
    table = torch.nn.Embedding(5, 3)
    rows = TokenEmbedding(table, [7, 2], torch.ones(2, 3) * torch.tensor([[1.0], [2.0]]))
    out = rows(torch.tensor([[0, 7, 2]]))
    assert torch.equal(out[0, 0], table.weight[0]) and torch.equal(out[0, 1:].mean(-1), torch.tensor([1.0, 2.0]))


def test_disendiff_new_tokens_start_from_the_methods_own_rows() -> None:
    tokenizer = clip_tokenizer()
    table = torch.nn.Embedding(len(tokenizer), 4)
    encoder = SimpleNamespace(get_input_embeddings=lambda: table)
    model: Any = SimpleNamespace(tokenizers=(tokenizer,), text_encoders=(encoder,), device=torch.device("cpu"))
    config = MultiConceptConfig()
    assert [config.initializer(index, 3) for index in range(3)] == ["ucd", "pll", "ktn"]  # the last has the first word
    for word, row in (("ktn", 42170), ("pll", 47629), ("ucd", 43514), ("cat", 2368)):
        start = initial_embeddings(model, Subject("<a>", "cat"), word)["text_encoder"]
        assert torch.equal(start[0], table.weight[row]), word


def test_starts_do_not_repeat_from_four_concepts_on() -> None:
    rows = {f"<c{number}>": {"text_encoder": torch.arange(8.0)[None] * (number % 3 + 1)} for number in range(7)}
    distinct = with_distinct_starts(rows, seed=0)
    starts = [distinct[token]["text_encoder"] for token in rows]
    assert all(torch.equal(starts[number], rows[f"<c{number}>"]["text_encoder"]) for number in range(3))
    distances = [float((a - b).norm()) for number, a in enumerate(starts) for b in starts[:number]]
    assert min(distances) > 0.25  # a quarter of the first row's standard deviation, 0.6, in each of 8 dimensions
