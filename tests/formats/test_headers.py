"""What the headers of files say: of alpha, of the base model, of the data; read and written."""

import json
from dataclasses import replace

import pytest

from personalize.adapters.adapter import Adapter
from personalize.adapters.export import export_lora
from personalize.adapters.merging import merged
from personalize.errors import UserError
from personalize.formats.diffusion_transformers.checking import verify_transformer_file
from personalize.formats.foreign_files import read_adapter_file
from personalize.formats.inspection import inspect_file
from personalize.formats.lora_files import kohya_metadata
from personalize.formats.verification import verify_file
from personalize.io.tensor_files import read_tensors
from tests.formats.diffusion_transformers.test_files import BLOCK, write
from tests.formats.test_conversion import assert_same, convert, deltas
from tests.support.adapter_kinds import truth
from tests.support.foreign_files import diffusers, kohya, modules, save, small_state
from tests.support.lora_states import random_adapter
from tests.support.tiny import tiny


@pytest.fixture(scope="module")
def state():
    return small_state("sd1", want=lambda path: path.startswith("mid_block.") and ".attn" in path)


@pytest.mark.parametrize("header", [{"network_alpha": "None"}, {"alpha": "?"}, {"alpha": "2", "lora_alpha": "3"}])
def test_a_header_is_not_asked_where_every_module_has_its_alpha(tmp_path, state, header):
    file = save(tmp_path / "in.safetensors", kohya(state, "sd1", alphas=2.0), header)
    assert inspect_file(file).readers["personalize"] == ("yes", "") and not inspect_file(file).problems
    assert_same(deltas(convert(file, "kohya", tmp_path / "out.safetensors"), "sd1"), truth(state, 2.0 / 4))


@pytest.mark.parametrize(
    ("header", "alpha"),
    [({"network_alpha": "None"}, 4), ({"lora_alpha": "16", "network_alpha": "16.0"}, 16),
     ({"lora_alpha": "None", "alpha": "8"}, 8)],
)  # fmt: skip
def test_alphas_of_a_header_are_compared_as_numbers(tmp_path, state, header, alpha):
    file = save(tmp_path / "in.safetensors", diffusers(state), header)
    assert_same(deltas(convert(file, "kohya", tmp_path / "out.safetensors"), "sd1"), truth(state, alpha / 4))


@pytest.mark.parametrize(
    ("header", "message"),
    [({"alpha": "?"}, "'\\?', a number was expected"), ({"alpha": "2", "lora_alpha": "3"}, "two values of alpha"),
     ({"alpha": "-1"}, "a positive number"), ({"alpha": "nan"}, "a positive number")],
)  # fmt: skip
def test_a_header_that_does_not_tell_alpha_is_an_error_where_it_is_needed(tmp_path, state, header, message):
    file = save(tmp_path / "in.safetensors", diffusers(state), header)
    with pytest.raises(UserError, match=message):
        read_adapter_file(file)
    assert sum(message.strip("'\\?") in problem for problem in inspect_file(file).problems) <= 1


def test_what_is_exported_says_its_own_family_as_what_is_converted(tmp_path):
    state = small_state("sdxl", want=lambda path: path.startswith("mid_block.") and ".attn" in path)
    wrong = {"ss_base_model_version": "sd_v1", "ss_v2": "False", "ss_network_module": "lycoris.kohya",
             "ss_network_args": '{"algo": "loha"}', "ss_seed": "7"}  # fmt: skip
    file = save(tmp_path / "in.safetensors", kohya(state, "sdxl", 4.0), wrong)
    export_lora(Adapter.load(file, family="sdxl"), tmp_path / "exported.safetensors")
    convert(file, "kohya", tmp_path / "converted.safetensors", family="sdxl")
    for name in ("exported", "converted"):
        found = read_tensors(tmp_path / f"{name}.safetensors").metadata
        assert found["ss_base_model_version"] == "sdxl_base_v1-0" and found["ss_network_args"] == "{}"
        assert (found["ss_network_module"], found["ss_seed"]) == ("networks.lora", "7")
        assert inspect_file(tmp_path / f"{name}.safetensors").family == "sdxl"


def test_a_base_that_predicts_v_stays_one(tmp_path):
    state = small_state("sd2", want=lambda path: path.startswith("mid_block.") and ".attn" in path)
    file = save(tmp_path / "in.safetensors", kohya(state, "sd2", 4.0), {"ss_base_model_version": "sd_v2_v"})
    found = read_tensors(convert(file, "kohya", tmp_path / "out.safetensors")).metadata
    assert (found["modelspec.prediction_type"], found["ss_base_model_version"]) == ("v", "sd_v2_v")
    assert "768-v" in found["modelspec.architecture"] and "ss_num_train_images" not in found


@pytest.mark.parametrize("about", [{}, {"modelspec.architecture": "stable-diffusion-v2-768-v/lora"}])
def test_what_a_file_does_not_say_of_the_prediction_is_not_made_up(tmp_path, about):
    """A file that states ModelSpec's architecture alone, as SimpleTuner's, was said to predict both v and ε."""
    state = small_state("sd2", want=lambda path: path.startswith("mid_block.") and ".attn" in path)
    file = save(tmp_path / "in.safetensors", kohya(state, "sd2", 4.0), about)
    found = read_tensors(convert(file, "kohya", tmp_path / "out.safetensors")).metadata
    expected = ("v", "sd_v2_v") if about else (None, "sd_v2")
    assert (found.get("modelspec.prediction_type"), found["ss_base_model_version"]) == expected


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_alpha_is_never_rounded(tmp_path, state, dtype):
    """bfloat16 has 8 bits for a number's digits: 289 would become 288."""
    wide = {
        key: tensor.repeat(73, 1) / 99 if "lora_A" in key else tensor.repeat(1, 73) for key, tensor in state.items()
    }
    wide = {key: tensor[:289] if "lora_A" in key else tensor[:, :289] for key, tensor in wide.items()}
    file = save(tmp_path / "in.safetensors", kohya(wide, "sd1", alphas=289.0))
    written = convert(file, "kohya", tmp_path / "out.safetensors", dtype=dtype)
    alphas = {float(t) for key, t in read_tensors(written).tensors.items() if key.endswith(".alpha")}
    assert alphas == {289.0} and inspect_file(written).strengths == {"1": len(modules(wide))}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_transformers_file_has_the_hashes_of_its_own_data(tmp_path, dtype):
    stale = {"modelspec.hash_sha256": "0x" + 64 * "0", "sshs_model_hash": 64 * "0", "ss_seed": "7"}
    sizes = {path: size for path, size in BLOCK.items() if path != "norm_out.linear"}  # diffusers does not load it
    file, _ = write(tmp_path / "in.safetensors", sizes, metadata=stale)
    written = convert(file, "kohya", tmp_path / "out.safetensors", dtype=dtype)
    content = read_tensors(written)
    assert content.metadata["ss_seed"] == "7"
    assert verify_transformer_file(written, content, "flux1").ok


def test_pictures_and_licences_go_with_an_adapter(tmp_path):
    one = random_adapter(tiny("sd1"))
    several = replace(one, info={**one.info, "pictures": 5, "license": "cc-by-nc-4.0"})
    folder = several.save(tmp_path / "five")
    assert read_tensors(folder / "five.safetensors").metadata["ss_num_train_images"] == "5"
    assert read_tensors(one.save(tmp_path / "one") / "one.safetensors").metadata["ss_num_train_images"] == "1"
    other = replace(one, info={**one.info, "license": "mit"})
    for adapters, licence in ([several, one], "cc-by-nc-4.0"), ([several, other], "other"), ([one, one], None):
        assert merged(adapters, [1.0, 1.0], ["a", "b"]).info.get("license") == licence
    folder = merged([several, one], [1.0, 1.0], ["a", "b"]).save(tmp_path / "sum")
    assert read_tensors(folder / "sum.safetensors").metadata["ss_num_train_images"] == "6"
    foreign = merged([one, replace(one, info={**one.info, "imported": "x"})], [1.0, 1.0], ["a", "b"])
    header = read_tensors(foreign.save(tmp_path / "both") / "both.safetensors").metadata
    assert "ss_num_train_images" not in header  # of the second nobody knows
    card = (folder / "README.md").read_text("utf-8")
    assert f"license: {json.dumps('cc-by-nc-4.0')}" in card and verify_file(tmp_path / "sum" / "sum.safetensors").ok


@pytest.mark.parametrize(
    ("info", "tags"),
    [
        ({"caption": "a cat"}, {"a cat": 1}),
        ({"caption": "A cat, on  grass,", "pictures": 5}, {"a cat": 5, "on grass": 5}),
        (
            {"caption": "a cat, on grass", "captions": ["a cat, on grass", "a cat"], "caption_counts": [2, 3]},
            {"a cat": 5, "on grass": 2},
        ),
        ({"caption": "a cat", "captions": ["a cat", "a dog"], "pictures": 5}, {"a cat": 1, "a dog": 1}),  # of old
        ({"caption": "a cat, a dog", "merged_from": [{}, {}], "pictures": 6}, {"a cat": 1, "a dog": 1}),
        ({"caption": ""}, None), ({"caption": " , "}, None), ({}, None),
    ],
)  # fmt: skip
def test_tags_are_counted_over_the_pictures_as_kohya_does(info, tags):
    header = kohya_metadata(title="x", family="sd1", rank=4, info=info)
    assert ("ss_tag_frequency" in header) == (tags is not None)
    assert tags is None or json.loads(header["ss_tag_frequency"]) == {"1_picture": tags}


@pytest.mark.parametrize(
    "rule",
    ['{"rank": 4, "min_rank": 1, "alpha": Infinity, "timesteps": 1000}',
     '{"rank": Infinity, "min_rank": 1, "alpha": 1, "timesteps": 1000}',
     '{"rank": 4, "min_rank": 1, "alpha": 1e300, "timesteps": 1000}',
     '{"rank": 4, "min_rank": 1, "alpha": 1, "timesteps": 1000000000}'],
)  # fmt: skip
def test_a_rule_for_the_rank_that_cannot_be_carried_out_is_damaged(tmp_path, state, rule):
    """The first two ended in a traceback; the others in powers and tables without end, as soon as it was applied."""
    file = save(tmp_path / "in.safetensors", kohya(state, "sd1", alphas=4.0), {"ss_timestep_rank": rule})
    assert any("timestep-dependent rank is damaged" in problem for problem in inspect_file(file).problems)
    with pytest.raises(UserError, match="timestep-dependent rank is damaged"):
        _ = Adapter.load(file).timestep_rank  # read as soon as it is applied
