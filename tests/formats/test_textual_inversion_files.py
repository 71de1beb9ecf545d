"""Files of learned tokens: stock diffusers and the graphical programs read them, and invalid ones are refused."""

import warnings
from dataclasses import replace

import pytest
import torch

from personalize.adapters.adapter import Adapter
from personalize.errors import Notice, UserError
from personalize.formats.inspection import inspect_file
from personalize.formats.textual_inversion_files import (
    LearnedToken,
    checked_rows,
    read_concept,
    read_concepts,
    require_token_files,
    token_file_contents,
    token_file_names,
    token_file_stem,
    ui_file,
)
from personalize.formats.verification import verify_folder
from personalize.io.atomic import write_file, write_folder
from personalize.io.tensor_files import TensorFile, read_tensors, tensor_bytes
from tests.support.lora_states import ATTENTION, paths, random_lora
from tests.support.tiny import tiny


def rows(count=2, **widths):
    widths = widths or {"text_encoder": 32}
    return {name: torch.linspace(-1, 1, count * width).reshape(count, width) for name, width in widths.items()}


TWO = {"<my-cat>": rows(3), "dog": rows(1)}
XL = {"<my-cat>": rows(2, text_encoder=32, text_encoder_2=40)}


def test_file_names_contain_the_token_and_the_reading_program():
    assert [token_file_stem(token) for token in ("<my-cat>", "a/../b", "<>", "été")] == [
        "my-cat",
        "a_.._b",
        "token",
        "été",
    ]
    assert token_file_names(TWO) == {
        "my-cat.safetensors": ("<my-cat>", None),
        "my-cat_learned_embeds.safetensors": ("<my-cat>", "text_encoder"),
        "dog.safetensors": ("dog", None),
        "dog_learned_embeds.safetensors": ("dog", "text_encoder"),
    }
    assert list(token_file_names(XL, "diffusers")) == ["learned_embeds.safetensors", "learned_embeds_2.safetensors"]


def test_keys_and_metadata_of_both_layouts(tmp_path):
    write_folder(tmp_path / "sd", token_file_contents(TWO))
    write_folder(tmp_path / "xl", token_file_contents(XL, family="sdxl", dtype=torch.float16))
    keys = {path.name: set(read_tensors(path).tensors) for path in (tmp_path / "sd").iterdir()}
    assert keys == {
        "my-cat.safetensors": {"emb_params"},
        "my-cat_learned_embeds.safetensors": {"<my-cat>"},
        "dog.safetensors": {"emb_params"},
        "dog_learned_embeds.safetensors": {"dog"},
    }
    content = read_tensors(tmp_path / "xl" / "my-cat.safetensors")
    assert {key: tuple(tensor.shape) for key, tensor in content.tensors.items()} == {
        "clip_l": (2, 32),
        "clip_g": (2, 40),
    }
    assert content.metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/textual-inversion"
    require_token_files(tmp_path / "sd", TWO)
    require_token_files(tmp_path / "xl", XL, dtype=torch.float16)
    second = read_concept(tmp_path / "xl" / "learned_embeds_2.safetensors")
    assert second.token == "<my-cat>" and set(second.rows) == {"text_encoder_2"}
    first = read_concept(tmp_path / "sd" / "my-cat.safetensors", "<my-cat>")
    assert first.token == "<my-cat>" and torch.equal(first.rows["text_encoder"], TWO["<my-cat>"]["text_encoder"])


def test_stock_diffusers_reads_both_layouts(tmp_path):
    model = tiny("sd1")
    pipe = model.pipeline()
    write_folder(tmp_path / "one", token_file_contents({"<my-cat>": rows(3)}))
    pipe.load_textual_inversion(tmp_path / "one")  # finds learned_embeds.safetensors, and the token in it
    ids = pipe.tokenizer(pipe.maybe_convert_prompt("a <my-cat>", pipe.tokenizer), add_special_tokens=False).input_ids
    table = pipe.text_encoder.get_input_embeddings().weight
    assert torch.equal(table[ids[-3:]], rows(3)["text_encoder"])
    ui = tmp_path / "one" / "my-cat.safetensors"
    pipe.load_textual_inversion(ui, token="ui-cat")
    first = pipe.tokenizer.convert_tokens_to_ids("ui-cat")
    assert torch.equal(pipe.text_encoder.get_input_embeddings().weight[first], rows(3)["text_encoder"][0])


def test_stock_diffusers_reads_sdxl_file_by_file(tmp_path):
    pipe = tiny("sdxl").pipeline()
    write_folder(tmp_path / "xl", token_file_contents(XL, family="sdxl"))
    for ending, tokenizer, encoder in (
        ("", pipe.tokenizer, pipe.text_encoder),
        ("_2", pipe.tokenizer_2, pipe.text_encoder_2),
    ):
        name = f"learned_embeds{ending}.safetensors"
        pipe.load_textual_inversion(tmp_path / "xl", weight_name=name, tokenizer=tokenizer, text_encoder=encoder)
        ids = [tokenizer.convert_tokens_to_ids(token) for token in ("<my-cat>", "<my-cat>_1")]
        found = encoder.get_input_embeddings().weight[ids]
        assert torch.equal(found, XL["<my-cat>"][f"text_encoder{ending}"])


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ({"emp_params": torch.ones(2, 768)}, {"text_encoder": (2, 768)}),
        ({"text_encoders_0": torch.ones(2, 768), "text_encoders_1": torch.ones(2, 1280)}, "sdxl"),
        ({"clip_l": torch.ones(768)}, {"text_encoder": (1, 768)}),
        ({"<s>": torch.ones(1, 1280)}, {"text_encoder_2": (1, 1280)}),
    ],
)
def test_files_of_other_programs_are_read(tmp_path, tensors, expected):
    found = read_concept(write_file(tmp_path / "style.safetensors", tensor_bytes(tensors)))
    expected = {"text_encoder": (2, 768), "text_encoder_2": (2, 1280)} if expected == "sdxl" else expected
    assert {key: tuple(tensor.shape) for key, tensor in found.rows.items()} == expected
    assert found.token == ("<s>" if "<s>" in tensors else "style")


def test_an_sdxl_token_of_one_text_encoder_keeps_its_key(tmp_path):
    path = write_file(tmp_path / "x.safetensors", ui_file(LearnedToken("x", rows()), family="sdxl"))
    assert set(read_tensors(path).tensors) == {"clip_l"}


@pytest.mark.parametrize(
    ("token", "values", "message"),
    [
        ("two words", rows(), "no token"),
        ("", rows(), "no token"),
        ("x", {}, "expected text_encoder"),
        ("x", {"unet": torch.ones(1, 4)}, "expected text_encoder"),
        ("x", {"text_encoder": torch.ones(1, 4), "text_encoder_2": torch.ones(2, 4)}, "one n"),
        ("x", {"text_encoder": torch.ones(1, 1, 4)}, "expected"),
        ("x", {"text_encoder": torch.ones(76, 4)}, "1 to 75 rows"),
        ("x", {"text_encoder": torch.full((1, 4), float("nan"))}, "not finite"),
    ],
)
def test_invalid_rows_are_refused(token, values, message):
    with pytest.raises(UserError, match=message):
        checked_rows(token, values)


def test_invalid_files_are_refused(tmp_path):
    lora = write_file(tmp_path / "lora.safetensors", tensor_bytes({"a.lora_A": torch.ones(1), "b": torch.ones(1)}))
    twice = tensor_bytes({"clip_l": torch.ones(1, 4), "emb_params": torch.ones(1, 4)})
    for attempt, message in (
        (lambda: read_concept(lora), "holds 2 tensors"),
        (lambda: read_concept(write_file(tmp_path / "t.safetensors", twice)), "twice"),
        (lambda: token_file_contents({"<cat>": rows(), "CAT": rows()}), "another token is"),
        (lambda: token_file_contents({"clip_l": rows()}), "word of the file formats"),
        (
            lambda: token_file_contents({"x": {"text_encoder": torch.full((1, 4), 1e6)}}, dtype=torch.float16),
            "does not fit",
        ),
        (lambda: token_file_contents(XL, family="sd1"), "which sd1 does not have"),
        (lambda: token_file_names(XL, "kohya"), "unknown layout"),
    ):
        with pytest.raises(UserError, match=message):
            attempt()


def test_a_word_that_ends_in_out_is_a_token_as_any_other(tmp_path):
    """It was taken for one of OneTrainer's `emp_params_out`, and the file was said to be empty."""
    data = tensor_bytes({"night_out": torch.ones(2, 768)})
    found = read_concept(write_file(tmp_path / "learned_embeds.safetensors", data))
    assert found.token == "night_out" and torch.equal(found.rows["text_encoder"], torch.ones(2, 768))


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_rows_for_the_output_of_an_encoder_are_not_passed_over_in_silence(tmp_path, family):
    """OneTrainer's "output embeddings", which no other program applies."""
    keys = {"emp_params": 768} if family == "sd1" else {"clip_l": 768, "clip_g": 1280}
    both = {key: torch.ones(1, width) for key, width in keys.items()}
    both |= {f"{key}_out": torch.ones(1, width) for key, width in keys.items()}
    said = " ".join(rf"{key}_out,?" for key in sorted(keys)) + r" \(rows for a text encoder's output"
    whole = write_file(tmp_path / "cat.safetensors", tensor_bytes(both))
    with pytest.warns(Notice, match=said):
        assert len(read_concept(whole).rows) == len(keys)
    assert any("rows for a text encoder's output" in problem for problem in inspect_file(whole).problems)
    alone = {key: rows for key, rows in both.items() if key.endswith("_out")}
    with pytest.raises(UserError, match=f"holds nothing else: {said}"):
        read_concept(write_file(tmp_path / "dog.safetensors", tensor_bytes(alone)))
    unused = {key: rows * (not key.endswith("_out")) for key, rows in both.items()}
    with warnings.catch_warnings(action="error", category=Notice):
        read_concept(write_file(tmp_path / "fox.safetensors", tensor_bytes(unused)))


def test_tokens_that_would_have_one_word_are_refused(tmp_path):
    """The second took the place of the first."""
    bundled = {f"bundle_emb.{name}.emb_params": torch.ones(1, 768) for name in ("my cat", "my_cat")}
    with pytest.raises(UserError, match="differ in spaces alone, my cat, my_cat"):
        read_concepts(tmp_path / "x.safetensors", TensorFile(bundled, {}))


def test_an_adapter_saves_and_loads_learned_tokens(tmp_path):
    model = tiny("sd1")
    lora = random_lora(paths(model.unet, ATTENTION))
    adapter = Adapter(lora, 4, 4.0, None, {"base": model.identity}, TWO)
    folder = adapter.save(tmp_path / "my-cat")
    names = {path.name for path in folder.iterdir()}
    assert set(token_file_names(TWO)) | {"my-cat_lora.safetensors"} <= names  # the LoRA gives way to the trigger's name
    found = Adapter.load(folder)
    assert found.info == adapter.info and found.concepts.keys() == TWO.keys()
    for token, values in TWO.items():
        assert torch.equal(found.concepts[token]["text_encoder"], values["text_encoder"])
    require_token_files(folder, found.concepts)
    assert verify_folder(folder).ok
    other_rows = tensor_bytes({"dog": torch.zeros(1, 32)})
    (folder / "dog_learned_embeds.safetensors").write_bytes(other_rows)
    with pytest.raises(UserError, match="is not what was saved"):
        Adapter.load(folder)
    wrong = {file.file.split()[0]: file.problems for file in verify_folder(folder).files if file.problems}
    assert wrong["dog_learned_embeds.safetensors"] == ("tensor text_encoder is not what was saved",)
    assert wrong["adapter.json"] == ("dog_learned_embeds.safetensors is not what was saved",)  # by its bytes
    replace(adapter, concepts={}).save(folder)
    left = {path.name for path in folder.iterdir()}
    assert left == {"pytorch_lora_weights.safetensors", "my-cat.safetensors", "adapter.json", "README.md"}
