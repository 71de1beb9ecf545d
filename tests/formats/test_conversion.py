"""Convert: the result gives the same weight updates under correct names, and errors of the source are corrected."""

import json
import re
from types import SimpleNamespace

import pytest
import torch

from personalize.cli.commands import convert as convert_command
from personalize.errors import UserError
from personalize.formats import lora_files
from personalize.formats.foreign_files import read_adapter_file
from personalize.formats.lora_files import diffusers_file
from personalize.formats.reader_keys import ReaderKeys
from personalize.formats.textual_inversion_files import read_concept
from personalize.formats.verification import verify_file
from personalize.io.json_files import read_json
from personalize.io.tensor_files import read_tensors
from tests.support.foreign_files import (
    delta,
    diffusers,
    kohya,
    modules,
    old_diffusers,
    save,
    small_state,
    with_uneven_ranks,
)
from tests.support.lora_predictions import difference, through_loader, with_merged
from tests.support.lora_states import ATTENTION, EVERYTHING, TRANSFORMER, paths, random_lora, text_lora
from tests.support.tiny import tiny

TARGETS = {"attention": ATTENTION, "transformer": TRANSFORMER, "full": EVERYTHING}
TOPOLOGIES = {"sd1": "sd1", "sd2": "sd2v", "sdxl": "sdxl"}
# Factors are scaled once in fp32 on the way: 2⁻²⁴ per number, a few of them in a product of rank 4.
EXACT = 1e-6
CLOSE = 1e-5  # of a prediction: see test_formats


def convert(file, to, output, **options):
    chosen = {"dtype": "float32"} | dict.fromkeys(("family", "token", "rank"))
    chosen |= dict.fromkeys(("unet_only", "allow_pickle"), False) | options
    return convert_command.run(SimpleNamespace(file=file, to=to, output=output, overwrite=True, **chosen))


def deltas(path, family):
    """ΔW by module, read with the keys of `reader_names`."""
    content = read_tensors(path)
    names = ReaderKeys(family)
    kohya_names = any(key.startswith("lora_") for key in content.tensors)
    found, problems = names.kohya(content) if kohya_names else names.peft(content)
    assert not problems
    return {module: delta(*values) for module, values in found.items()}


def assert_same(found, truth):
    assert found.keys() == truth.keys()
    for module, expected in truth.items():
        assert float((found[module] - expected).abs().max() / expected.abs().max()) < EXACT, module


PRODUCT = [
    (family, targets, text, kind)
    for family in TOPOLOGIES
    for targets in TARGETS
    for text in (False, True)
    for kind in ("alpha", "mixed")
]
SIXTH = [case for number, case in enumerate(PRODUCT) if number % 6 == (number // 12) % 6]


def foreign(tmp_path, family, targets, text, kind):
    """A file of kohya's tools and its true ΔW: one alpha that is not the rank, or ranks and alphas per module."""
    model = tiny(TOPOLOGIES[family])
    state = random_lora(paths(model.unet, TARGETS[targets])) | (text_lora(model) if text else {})
    if kind == "mixed":
        state, alphas, truth = with_uneven_ranks(state)
    else:
        alphas, truth = 1.0, {module: delta(a, b, 1 / 4) for module, (a, b) in modules(state).items()}
    about = {"ss_base_model_version": {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}[family]}
    return model, save(tmp_path / "foreign.safetensors", kohya(state, family, alphas), about), truth


@pytest.mark.parametrize(
    ("family", "targets", "text", "kind"),
    [case if case in SIXTH else pytest.param(*case, marks=pytest.mark.slow) for case in PRODUCT],
)
def test_round_trips_keep_every_weight_change(tmp_path, family, targets, text, kind):
    _, file, truth = foreign(tmp_path, family, targets, text, kind)
    lora = read_adapter_file(file)
    assert lora.family == family
    assert_same({m: delta(a, b, lora.alpha / lora.rank) for m, (a, b) in modules(lora.state).items()}, truth)
    there = convert(file, "diffusers", tmp_path / "pytorch_lora_weights.safetensors")
    back = convert(there, "kohya", tmp_path / "back.safetensors", family=family)
    for path in (there, back):
        assert_same(deltas(path, family), truth)
    tensors = read_tensors(back).tensors
    assert {float(t) for key, t in tensors.items() if key.endswith(".alpha")} == {float(lora.rank)}
    assert tensors.keys() == {key for key in kohya(lora.state, family, 1.0)}


@pytest.mark.slow
@pytest.mark.parametrize(("family", "targets", "text", "kind"), PRODUCT)
def test_diffusers_gives_the_same_prediction_with_what_was_converted(tmp_path, family, targets, text, kind):
    model, file, truth = foreign(tmp_path, family, targets, text, kind)
    outputs = [convert(file, to, tmp_path / f"{to}.safetensors", family=family) for to in ("diffusers", "kohya")]
    found = [through_loader(model, path) for path in outputs]
    lora = read_adapter_file(file)
    expected = with_merged(model, lora.state, lora.alpha / lora.rank)
    assert all(difference(prediction, expected) < CLOSE for prediction in found)


def test_files_with_uneven_alphas_and_ranks_are_wrong_in_diffusers_and_right_when_converted(tmp_path):
    """diffusers takes wrong factors alpha / r from a file with alphas and ranks per module."""
    model, file, _ = foreign(tmp_path, "sd1", "attention", False, "mixed")
    ours = convert(file, "kohya", tmp_path / "ours.safetensors", family="sd1")
    naive, converted = through_loader(model, file), through_loader(model, ours)
    lora = read_adapter_file(file)
    expected = with_merged(model, lora.state, lora.alpha / lora.rank)
    assert difference(naive, expected) > 100 * CLOSE
    assert difference(converted, expected) < CLOSE


def test_incomplete_or_mixed_names_are_corrected(tmp_path):
    """Mixed names, no text_model, no prefix, old attention processors, PEFT's folder: all become the same LoRA."""
    state = small_state("sd1", text=True, want=lambda path: ".attn" in path or path.endswith((".conv1", "conv_in")))
    unet = {key: tensor for key, tensor in state.items() if key.startswith("unet.")}
    attention = {key: tensor for key, tensor in state.items() if ".attn" in key or "self_attn" in key}
    cases = {
        "mixed": (diffusers(state, attention_only=True), state),
        "flat": (diffusers(state, nested=False), state),
        "flat kohya": (kohya(state, "sd1", 4.0, nested=False), state),
        "old": (old_diffusers(attention), attention),
        "bare": ({key.removeprefix("unet."): tensor for key, tensor in unet.items()}, unet),
        "folder": ({f"base_model.model.{key.removeprefix('unet.')}": tensor for key, tensor in unet.items()}, unet),
    }
    for name, (tensors, expected) in cases.items():
        file = save(tmp_path / "in.safetensors", tensors)
        written = convert(file, "kohya", tmp_path / f"{name}.safetensors")
        assert_same(deltas(written, "sd1"), {module: delta(a, b) for module, (a, b) in modules(expected).items()})
        assert not any("_te_" in key and "text_model" not in key for key in read_tensors(written).tensors)


def test_sdxl_block_names_become_the_original_ones(tmp_path):
    state = small_state("sdxl", want=lambda path: ".attn" in path or "embedding" in path or path.endswith("conv1"))
    file = save(tmp_path / "in.safetensors", kohya(state, "sdxl", 4.0, blocks="diffusers"))
    written = convert(file, "kohya", tmp_path / "out.safetensors")
    assert read_tensors(written).tensors.keys() == kohya(state, "sdxl", 4.0).keys()
    assert read_tensors(written).metadata["ss_base_model_version"] == "sdxl_base_v1-0"


def test_tucker_cores_are_multiplied_in_exactly(tmp_path):
    down, mid, up = torch.randn(3, 8, 1, 1), torch.randn(3, 3, 3, 3), torch.randn(8, 3, 1, 1)
    stem = "lora_unet_mid_block_resnets_0_conv1"
    tensors = {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up, "alpha": torch.tensor(1.0)}
    file = save(tmp_path / "in.safetensors", {f"{stem}.{key}": tensor for key, tensor in tensors.items()})
    written = convert(file, "kohya", tmp_path / "out.safetensors", family="sd1")
    x = torch.randn(1, 8, 5, 5)
    chained = torch.conv2d(torch.conv2d(torch.conv2d(x, down), mid, padding=1), up) / 3
    (made,) = deltas(written, "sd1").values()
    assert torch.allclose(
        torch.conv2d(x, made.float().reshape(8, 8, 3, 3), padding=1), chained, atol=1e-4
    )  # sums of 72


def test_the_source_files_metadata_are_kept_except_those_about_its_layout(tmp_path):
    about = {"ss_output_name": "cat", "ss_network_dim": "Dynamic", "ss_seed": "3", "junk": "x", "ss_v2": "True"}
    file = save(tmp_path / "in.safetensors", kohya(small_state("sd1"), "sd1", 1.0), about)
    found = read_tensors(convert(file, "kohya", tmp_path / "out.safetensors")).metadata
    assert (found["ss_output_name"], found["ss_seed"], found["ss_network_dim"]) == ("cat", "3", "4")
    assert found["ss_base_model_version"] == "sd_v1" and found["ss_v2"] == "False" and "junk" not in found


def test_peft_folder_loads_in_peft_itself(tmp_path):
    from peft import PeftModel

    model = tiny("sd1")
    state = random_lora(paths(model.unet, ATTENTION))
    (tmp_path / "in.safetensors").write_bytes(diffusers_file(state, 8.0))
    folder = convert(tmp_path / "in.safetensors", "peft", tmp_path / "peft")
    assert read_json(folder / "adapter_config.json")["lora_alpha"] == 8
    loaded = PeftModel.from_pretrained(tiny("sd1").unet, str(folder)).merge_and_unload()
    expected = tiny("sd1").unet.state_dict()
    for module, (a, b) in modules(state).items():
        path = module.removeprefix("unet.") + ".weight"
        change = loaded.state_dict()[path] - expected[path]
        assert torch.allclose(change.flatten(1).double(), delta(a, b, 2.0), atol=1e-6)  # fp32 weights near 1
    assert convert(tmp_path / "in.safetensors", "peft", folder) == folder.resolve()  # again, in the same place
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="already holds notes.txt"):
        convert(tmp_path / "in.safetensors", "peft", folder)


def test_text_encoders_get_a_peft_folder_of_their_own(tmp_path):
    state = small_state("sd1", text=True)
    folder = convert(save(tmp_path / "in.safetensors", state), "peft", tmp_path / "peft")
    assert {path.name for path in folder.iterdir()} == {"unet", "text_encoder"}
    written = {}
    for part in ("unet", "text_encoder"):
        config = read_json(folder / part / "adapter_config.json")
        for key, tensor in read_tensors(folder / part / "adapter_model.safetensors").tensors.items():
            written[f"{part}.{key.removeprefix('base_model.model.')}"] = tensor
            assert re.sub(r".lora_[AB].weight", "", key).removeprefix("base_model.model.") in config["target_modules"]
    expected = {key.replace("text_model.", ""): tensor for key, tensor in state.items()}
    assert written.keys() == expected.keys() and all(torch.equal(written[key], expected[key]) for key in written)
    (folder / "unet" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="already holds notes.txt"):
        convert(tmp_path / "in.safetensors", "peft", folder)


def test_a_folder_that_is_read_is_not_written_into(tmp_path):
    """With --overwrite PEFT's folder was replaced by what had been read from it, at a lower rank or precision."""
    folder = convert(save(tmp_path / "in.safetensors", small_state("sd1")), "peft", tmp_path / "peft")
    weights = folder / "adapter_model.safetensors"
    before = weights.read_bytes()
    for file, to, output in ((weights, "peft", folder), (folder, "kohya", weights)):
        with pytest.raises(UserError, match="which is read, are one in the other: name another --output"):
            convert(file, to, output, dtype="float16")
    assert weights.read_bytes() == before
    convert(folder, "kohya", folder / "new.safetensors")  # a new file replaces nothing


def test_refusals_write_nothing(tmp_path):
    state = small_state("sd1", text=True)
    lora = save(tmp_path / "lora.safetensors", state)
    token = save(tmp_path / "token.safetensors", {"emb_params": torch.ones(1, 768)})
    stem = "lora_unet_down_blocks_0_x"
    pair = {f"{stem}.lora_down.weight": torch.ones(1, 2), f"{stem}.lora_up.weight": torch.ones(2, 1)}
    nowhere = save(tmp_path / "nowhere.safetensors", pair)
    place = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    unclear = {key.replace(stem, place): tensor for key, tensor in pair.items()}
    unclear, partly = (save(tmp_path / f"{n}.safetensors", unclear | more) for n, more in enumerate(({}, pair)))
    dora = save(tmp_path / "dora.safetensors", {"lora_unet_conv_in.dora_scale": torch.ones(4)})
    half = save(tmp_path / "half.safetensors", {"unet.conv_in.lora_A.weight": torch.ones(2, 2)})
    before = {path.name for path in tmp_path.iterdir()}
    for file, to, output, message in (
        (lora, "kohya", lora, "is the file to convert"),
        (token, "peft", "out", "learned token"), (nowhere, "kohya", "out", "none of its modules"),
        (unclear, "kohya", "out", "does not tell the family"),
        (dora, "kohya", "out", "of DoRA lacks A and B"), (half, "kohya", "out", "has only"),
        (tmp_path / "gone", "kohya", "out", "does not exist"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            convert(file, to, tmp_path / output)
    with pytest.raises(UserError, match="holds no learned token that could be called <cat>: leave --token out"):
        convert(lora, "kohya", tmp_path / "out", token="<cat>")
    with pytest.raises(UserError, match="learned tokens alone, and no UNet part: leave --unet_only out"):
        convert(token, "kohya", tmp_path / "out.safetensors", unet_only=True)
    with pytest.raises(UserError, match="1 module.s., first .unet.down_blocks.0.x., are in no model of sd1"):
        convert(partly, "kohya", tmp_path / "out", family="sd1")
    assert {path.name for path in tmp_path.iterdir()} == before
    assert convert(lora, "peft", tmp_path / "out", unet_only=True).is_dir()


def test_an_error_in_the_writer_leaves_no_file(tmp_path, monkeypatch):
    file = save(tmp_path / "in.safetensors", small_state("sd1"))
    write = lora_files.kohya_file
    monkeypatch.setattr(lora_files, "kohya_file", lambda state, alpha, **rest: write(state, 2 * alpha, **rest))
    with pytest.raises(UserError, match="does not verify"):
        convert(file, "kohya", tmp_path / "out.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["in.safetensors"]


def test_learned_tokens_are_converted_between_the_layouts(tmp_path):
    rows, second = torch.randn(2, 768), torch.randn(2, 1280)
    a1111 = save(tmp_path / "cat.safetensors", {"emb_params": rows})
    there = convert(a1111, "diffusers", tmp_path / "learned_embeds.safetensors", token="<cat>")
    assert torch.equal(read_tensors(there).tensors["<cat>"], rows)
    back = convert(there, "kohya", tmp_path / "cat2.safetensors")
    assert torch.equal(read_tensors(back).tensors["emb_params"], rows)
    both = save(tmp_path / "xl.safetensors", {"clip_l": rows, "clip_g": second})
    folder = convert(both, "diffusers", tmp_path / "xl")
    assert {path.name for path in folder.iterdir()} == {"learned_embeds.safetensors", "learned_embeds_2.safetensors"}
    assert torch.equal(read_concept(folder / "learned_embeds_2.safetensors").rows["text_encoder_2"], second)
    with pytest.raises(UserError, match="name a new folder"):
        convert(both, "diffusers", tmp_path / "xl")


def test_pickles_are_converted_only_if_allowed(tmp_path):
    rows, state = torch.randn(2, 768), small_state("sd1")
    torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": rows}, "name": "cat"}, tmp_path / "e.pt")
    torch.save({"<cat>": rows}, tmp_path / "learned_embeds.bin")
    torch.save(state, tmp_path / "lora.bin")
    with pytest.raises(UserError, match="--allow_pickle"):
        convert(tmp_path / "e.pt", "diffusers", tmp_path / "e.safetensors")
    for name in ("e.pt", "learned_embeds.bin"):
        written = convert(tmp_path / name, "kohya", tmp_path / "e.safetensors", allow_pickle=True)
        assert torch.equal(read_tensors(written).tensors["emb_params"], rows)
    written = convert(tmp_path / "lora.bin", "diffusers", tmp_path / "l.safetensors", allow_pickle=True)
    assert len(json.loads(read_tensors(written).metadata["lora_adapter_metadata"])["unet.target_modules"]) == 128


def test_converting_to_half_precision(tmp_path):
    file = save(tmp_path / "in.safetensors", small_state("sd1"))
    written = convert(file, "kohya", tmp_path / "out.safetensors", dtype="float16")
    assert {tensor.dtype for tensor in read_tensors(written).tensors.values()} == {torch.float16}
    assert verify_file(written).ok
