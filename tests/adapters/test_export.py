"""Exporting LoRAs: what is worked into the weights equals what happens while running, in every layout."""

import json
from dataclasses import replace
from itertools import product

import pytest
import torch
from peft import PeftModel

from personalize.adapters import lora, lora_scales
from personalize.adapters.adapter import Adapter
from personalize.adapters.export import LAYOUTS, baked, export_lora, with_lower_rank
from personalize.adapters.forgetting import parse_rule
from personalize.adapters.merging import merged
from personalize.errors import Notice, UserError
from personalize.formats import lora_files
from personalize.formats.lora_files import factor_pairs
from personalize.formats.timestep_rank import TimestepRank
from personalize.io.atomic import write_file
from personalize.io.tensor_files import read_tensors, tensor_bytes
from tests.support.lora_predictions import difference, through_loader
from tests.support.lora_states import (
    ATTENTION,
    EVERYTHING,
    TRANSFORMER,
    paths,
    predict,
    predict_with_delta,
    random_adapter,
    random_lora,
    text_lora,
)
from tests.support.tiny import tiny

CLOSE = 1e-5  # of the output's scale: fp32 rounding, 1e-7 per addition, through the twenty-odd layers of the tiny UNets
CLOSE_FP16 = 5e-3  # both factors rounded to 2⁻¹¹


def KEYS(path):
    return path.endswith(("attn2.to_k", ".conv1"))


def through_peft(name, folder):
    model = tiny(name)
    parts = {"unet": model.unet, **dict(zip(("text_encoder", "text_encoder_2"), model.text_encoders, strict=False))}
    for part, module in parts.items():
        place = folder / part if (folder / part).is_dir() else folder
        if part == "unet" or (folder / part).is_dir():
            PeftModel.from_pretrained(module, place)  # puts its layers into the module
    return predict(model)


def make(model, want, text, alpha=10.0):
    state = random_lora(paths(model.unet, want)) | (text_lora(model) if text else {})
    return Adapter(state, 4, alpha, None, {"base": {**model.identity, "prediction_type": model.prediction_type}})


def lost(tmp_path, name, want, text, layout):
    """How far the reader of `layout` is from ΔW added by hand, of the output's scale; the adapter matters."""
    model = tiny(name)
    adapter = make(model, want, text)
    path = export_lora(adapter, tmp_path / "out", layout)
    found = through_peft(name, path) if layout == "peft" else through_loader(model, path)
    expected = predict_with_delta(model, adapter)
    assert difference(predict(tiny(name)), expected) > 0.01
    return difference(found, expected)


@pytest.mark.parametrize(
    ("name", "want", "text", "layout"),
    [
        ("sd1", EVERYTHING, True, "kohya"),
        ("sdxl", KEYS, True, "diffusers"),
        ("sd2v", TRANSFORMER, False, "peft"),
        ("sd1", ATTENTION, True, "peft"),
    ],
)
def test_forgedit_c30_every_layout_gives_the_readers_the_same_prediction(tmp_path, name, want, text, layout):
    assert lost(tmp_path, name, want, text, layout) < CLOSE


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("name", "want", "text"), [*product(("sd1", "sd2v", "sdxl"), (ATTENTION, TRANSFORMER, EVERYTHING), (False, True))]
)
def test_forgedit_c30_every_topology_target_and_layout(tmp_path, name, want, text, layout):
    assert lost(tmp_path, name, want, text, layout) < CLOSE


@pytest.mark.parametrize(
    ("name", "forget", "strength"),
    [
        ("sd1", ("encoderattn", "noquery=0.25", "decoder=0.5"), 0.8),
        pytest.param("sd1", ("decoder",), 1.0, marks=pytest.mark.slow),
        pytest.param("sdxl", ("nodecoderkv",), -0.5, marks=pytest.mark.slow),
    ],
)
def test_forgedit_c30_worked_in_forgetting_equals_run_time_forgetting(tmp_path, name, forget, strength):
    model, rules = tiny(name), [parse_rule(text) for text in forget]
    adapter = random_adapter(model, want=EVERYTHING)
    path = export_lora(baked(adapter, forget, strength), tmp_path / "f.safetensors")
    with adapter.apply(model), lora_scales.scaled(model.unet, rules, strength):
        expected = predict(model)
    with adapter.apply(model):
        kept = lora_scales.multipliers(model.unet, lora.lora_layers(model.unet), rules)
        assert difference(predict(model), expected) > 0.01  # forgetting matters
    assert difference(through_loader(model, path), expected) < CLOSE
    dropped = {f"unet.{path}" for path, share in kept.items() if share == 0}
    found = Adapter.load(path)
    assert set(factor_pairs(found.lora)) == set(factor_pairs(adapter.lora)) - dropped
    assert bool(dropped) == any(not rule.degree for rule in rules)
    assert "worked in" in found.info["header"]["ss_training_comment"]


def test_text_encoders_take_the_strength_but_know_no_sides():
    adapter = make(tiny("sd1"), EVERYTHING, True)
    found = baked(adapter, ["encoder", "decoder", "middle=0.5"], 0.5)
    for key, tensor in adapter.lora.items():
        if key.startswith("text_encoder.") and "lora_B" in key:
            assert torch.equal(found.lora[key], 0.5 * tensor)
    sides = {key.split(".")[1] for key in found.lora if key.startswith("unet.")}
    assert "mid_block" in sides and not sides & {"down_blocks", "up_blocks"} and "conv_in" in sides
    assert baked(adapter, ["none"]) is adapter


def test_half_precision(tmp_path):
    model = tiny("sd1")
    adapter = make(model, KEYS, False)
    half = export_lora(adapter, tmp_path / "h.safetensors", "kohya", torch.float16)
    assert {tensor.dtype for tensor in read_tensors(half).tensors.values()} == {torch.float16}
    assert difference(through_loader(model, half), predict_with_delta(model, adapter)) < CLOSE_FP16


def test_a_lower_rank_loses_what_it_says(tmp_path):
    adapter = make(tiny("sd1"), lambda path: KEYS(path) or "mid_block" in path, False)
    found, reduction = with_lower_rank(adapter, 2)
    path = export_lora(found, tmp_path / "r.safetensors")
    written, lost, whole = Adapter.load(path), 0.0, 0.0
    assert (written.rank, written.alpha) == (2, 2.0)
    for module, (a, b) in factor_pairs(adapter.lora).items():
        full = b.flatten(1) @ a.flatten(1) * (adapter.alpha / adapter.rank)
        a, b = factor_pairs(written.lora)[module]
        wrong = float((full - b.flatten(1) @ a.flatten(1)).square().sum())
        assert (wrong / float(full.square().sum())) ** 0.5 == pytest.approx(reduction.errors[module], abs=1e-5)  # fp32
        lost, whole = lost + wrong, whole + float(full.square().sum())
    assert reduction.error == pytest.approx((lost / whole) ** 0.5, rel=1e-4)
    with pytest.raises(UserError, match="rank 4: --rank must be lower"):
        with_lower_rank(adapter, 4)


def test_merging_adds_up_and_says_of_what(tmp_path):
    model = tiny("sd1")
    first, second = make(model, KEYS, False), make(model, ATTENTION, False, alpha=2.0)
    rows = {"text_encoder": torch.ones(1, 32)}
    first = replace(first, concepts={"<a>": rows}, info=first.info | {"caption": "a cat"})
    both = merged([first, second], [0.5, -1.0], ["one", "two"])
    folder = both.save(tmp_path / "both")
    expected = tiny("sd1")
    predict_with_delta(expected, replace(first, alpha=first.alpha * 0.5))
    assert (
        difference(
            through_loader(model, folder / "both.safetensors"),
            predict_with_delta(expected, negative(second)),
        )
        < CLOSE
    )
    found = Adapter.load(folder)
    assert found.rank == 8 and found.info["merged_from"][1] == {"name": "two", "weight": -1.0}
    assert found.concepts.keys() == {"<a>"} and found.info["caption"] == "a cat"
    for wrong, message in (
        ([first], "two adapters or more"),
        ([first, make(tiny("sdxl"), KEYS, False)], "family sdxl, one for sd1"),
        ([first, replace(second, info={"base": second.base | {"sha256": "0"}})], "another base model"),
        ([first, first], "learned the token <a>"),
    ):
        with pytest.raises(UserError, match=message):
            merged(wrong, [1.0] * len(wrong), ["one", "two"][: len(wrong)])


def test_a_sum_of_adapters_that_predict_different_things_is_said(tmp_path):
    """Both act in a base that predicts one of the two."""
    ours = make(tiny("sd1"), KEYS, False)
    header = {"ss_base_model_version": "sd_v1_v"}
    data = lora_files.kohya_file(ours.lora, 8.0, family="sd1", metadata=header)
    theirs = Adapter.load(write_file(tmp_path / "theirs.safetensors", data), family="sd1")
    with pytest.warns(Notice, match="ours with epsilon, theirs with v_prediction: a base has one"):
        assert merged([ours, theirs], [1.0, 1.0], ["ours", "theirs"]).base["prediction_type"] == "epsilon"


def negative(adapter):
    return replace(adapter, lora={key: -tensor if "lora_B" in key else tensor for key, tensor in adapter.lora.items()})


def test_a_foreign_file_keeps_its_header(tmp_path):
    model = tiny("sd2v")
    header = {"ss_base_model_version": "sd_v2_v", "ss_v2": "True", "ss_tag_frequency": "{}", "ss_network_dim": "99"}
    data = lora_files.kohya_file(make(model, ATTENTION, False).lora, 8.0, family="sd2", metadata=header)
    adapter = Adapter.load(write_file(tmp_path / "theirs.safetensors", data))
    assert adapter.base["prediction_type"] == "v_prediction" and adapter.info["header"]["ss_tag_frequency"] == "{}"
    adapter = replace(adapter, info=adapter.info | {"base": adapter.base | {"family": "sd2"}})
    found = read_tensors(export_lora(adapter, tmp_path / "ours.safetensors")).metadata
    assert found["ss_tag_frequency"] == "{}" and found["ss_base_model_version"] == "sd_v2_v"
    assert found["ss_network_dim"] == "4" and found["modelspec.title"] == "ours"
    assert found["modelspec.architecture"] == "stable-diffusion-v2-768-v/lora"


def test_names_and_places(tmp_path):
    adapter = make(tiny("sd1"), ATTENTION, False)
    assert export_lora(adapter, tmp_path / "cat").name == "cat.safetensors"
    assert export_lora(adapter, tmp_path / "cat", "diffusers").name == "pytorch_lora_weights.safetensors"
    assert export_lora(adapter, tmp_path / "DOG.SAFETENSORS").is_file(), "an ending in capitals was made a folder"
    folder = export_lora(adapter, tmp_path / "peft", "peft")
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["r"] == 4 and settings["lora_alpha"] == 10.0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for place, layout in (("cat", "kohya"), ("cat/cat.safetensors", "diffusers"), ("cat", "peft")):
        with pytest.raises(UserError, match="exists already"):
            export_lora(adapter, tmp_path / place, layout)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_file_that_is_not_right_never_appears(tmp_path, monkeypatch, layout):
    adapter = make(tiny("sd1"), ATTENTION, False)

    def damaged(tensors, *rest):
        first = next(key for key in sorted(tensors) if "lora" in key)
        return tensor_bytes(tensors | {first: tensors[first] * 1.01}, *rest)

    monkeypatch.setattr("personalize.formats.lora_files.tensor_bytes", damaged)
    monkeypatch.setattr("personalize.formats.peft_files.tensor_bytes", damaged)
    with pytest.raises(UserError, match="does not verify, 1 problem"):
        export_lora(adapter, tmp_path / "out", layout)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_mistakes(tmp_path):
    adapter = make(tiny("sd1"), ATTENTION, False)
    for attempt, message in (
        (lambda: baked(adapter, strength=0.0), "nothing of the adapter is left"),
        (lambda: baked(adapter, strength=float("nan")), "expected a number"),
        (lambda: baked(replace(adapter, lora={})), "learned tokens but no LoRA"),
        (lambda: baked(adapter, ["decodr"]), "unknown forgetting rule"),
        (lambda: baked(adapter, ["encoderattn"]), "forgets nothing here"),
        (lambda: export_lora(adapter, tmp_path / "x", "a1111"), "unknown layout"),
        (lambda: Adapter.load(tmp_path / "nothing"), "does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            attempt()


@pytest.mark.parametrize("layout", ["kohya", "diffusers", "peft"])
def test_timestep_rank_stays_with_files_that_leave_their_folder(tmp_path, layout):
    """diffusers' file did not say the rule, so that a copy or a link of it acted at full rank at all timesteps."""
    rule = TimestepRank(4, 1)
    made = make(tiny("sd1"), ATTENTION, False)
    adapter = replace(made, info={**made.info, "timestep_rank": rule.values()})
    folder = adapter.save(tmp_path / "mine")
    for name in ("mine.safetensors", "pytorch_lora_weights.safetensors"):
        (tmp_path / name).symlink_to(folder / name)
        assert Adapter.load(tmp_path / name).timestep_rank == rule
    written = export_lora(adapter, tmp_path / layout, layout)
    assert Adapter.load(written).timestep_rank == rule
    again = Adapter.load(tmp_path / "mine.safetensors").save(tmp_path / "again")  # which has the rule in its header
    assert Adapter.load(again / "pytorch_lora_weights.safetensors").timestep_rank == rule
