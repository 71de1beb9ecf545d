"""LoRA files: stock diffusers computes with exactly the weights we wrote, and where naive writers go wrong."""

import json

import pytest
import torch
from diffusers.utils import convert_state_dict_to_diffusers
from safetensors.torch import save_file

from personalize.errors import UserError
from personalize.formats.foreign_files import read_adapter_file
from personalize.formats.lora_files import (
    diffusers_file,
    factor_pairs,
    family_of,
    kohya_file,
    kohya_metadata,
)
from personalize.io.atomic import write_file
from personalize.io.tensor_files import read_tensors, tensor_bytes
from tests.support.lora_predictions import CLOSE, difference, through_loader, with_merged
from tests.support.lora_states import (
    ATTENTION,
    EVERYTHING,
    SHALLOW,
    TRANSFORMER,
    paths,
    predict,
    random_lora,
    text_lora,
)
from tests.support.tiny import tiny

# fp16 rounds both factors to 2⁻¹¹: each ΔW is off by up to 1e-3 of its scale.
CLOSE_FP16 = 5e-3


CASES = [
    pytest.param("sd1", EVERYTHING, True, 8.0, marks=pytest.mark.slow),
    ("sd1", ATTENTION, False, 1.0),
    pytest.param("sd2v", TRANSFORMER, True, 4.0, marks=pytest.mark.slow),  # linear projections, as in the next
    ("sdxl", SHALLOW, True, 8.0),
    pytest.param("sdxl", EVERYTHING, True, 8.0, marks=pytest.mark.slow),  # the further blocks too
]


@pytest.mark.parametrize(("name", "want", "text", "alpha"), CASES)
def test_forgedit_c30_both_files_give_stock_diffusers_the_same_prediction(tmp_path, name, want, text, alpha):
    model = tiny(name)
    state = random_lora(paths(model.unet, want)) | (text_lora(model) if text else {})
    peft = write_file(tmp_path / "pytorch_lora_weights.safetensors", diffusers_file(state, alpha))
    kohya = write_file(tmp_path / "k.safetensors", kohya_file(state, alpha, family=model.family))
    half = write_file(tmp_path / "h.safetensors", kohya_file(state, alpha, family=model.family, dtype=torch.float16))
    base, found = predict(model), {path.stem: through_loader(model, path) for path in (peft, kohya, half)}
    assert torch.equal(predict(model), base)
    expected = with_merged(model, state, alpha / 4)
    assert difference(base, expected) > 0.01  # the adapter matters
    assert difference(found["pytorch_lora_weights"], expected) < CLOSE
    assert difference(found["k"], expected) < CLOSE
    assert difference(found["h"], expected) < CLOSE_FP16


def test_diffusers_drops_modules_of_a_file_with_mixed_names_but_none_of_ours(tmp_path):
    """The example scripts rename attention keys only; the loader takes the naming scheme of the first key for all."""
    model = tiny("sd1")
    state = random_lora(paths(model.unet, lambda path: ATTENTION(path) or path.endswith((".conv1", "conv_in"))))
    naive = convert_state_dict_to_diffusers({key.removeprefix("unet."): tensor for key, tensor in state.items()})
    save_file({f"unet.{key}": tensor.contiguous() for key, tensor in naive.items()}, tmp_path / "naive.safetensors")
    ours = write_file(tmp_path / "ours.safetensors", diffusers_file(state, 4.0))
    found, lost = through_loader(model, ours), through_loader(model, tmp_path / "naive.safetensors")
    repaired = read_adapter_file(tmp_path / "naive.safetensors")
    expected = with_merged(model, state, 1.0)
    assert difference(lost, expected) > 100 * CLOSE
    assert difference(found, expected) < CLOSE
    assert repaired.state.keys() == state.keys() and all(torch.equal(repaired.state[key], state[key]) for key in state)


def test_without_metadata_diffusers_loses_alpha(tmp_path):
    model = tiny("sd1")
    state = random_lora(paths(model.unet, ATTENTION))
    save_file(state, tmp_path / "naive.safetensors")
    ours = write_file(tmp_path / "ours.safetensors", diffusers_file(state, 16.0))
    found, weak = through_loader(model, ours), through_loader(model, tmp_path / "naive.safetensors")
    expected = with_merged(model, state, 4.0)
    assert difference(weak, expected) > 100 * CLOSE
    assert difference(found, expected) < CLOSE


def test_diffusers_refuses_alpha_keys_together_with_metadata_so_we_write_one_or_the_other(tmp_path):
    model = tiny("sd1")
    state = random_lora(paths(model.unet, ATTENTION))
    write_file(tmp_path / "d.safetensors", diffusers_file(state, 8.0))
    write_file(tmp_path / "k.safetensors", kohya_file(state, 8.0, family="sd1", metadata={"ss_v2": "False"}))
    ours, theirs = read_tensors(tmp_path / "d.safetensors"), read_tensors(tmp_path / "k.safetensors")
    assert not any("alpha" in key for key in ours.tensors) and "lora_adapter_metadata" not in theirs.metadata
    save_file(theirs.tensors, tmp_path / "both.safetensors", {**theirs.metadata, **ours.metadata})
    with pytest.raises(ValueError, match="alphas"):
        through_loader(model, tmp_path / "both.safetensors")


def test_metadata_hold_rank_alpha_and_target_modules_and_nothing_else(tmp_path):
    model = tiny("sdxl")
    state = random_lora(paths(model.unet, ATTENTION), rank=2) | text_lora(model, rank=2)
    write_file(tmp_path / "d.safetensors", diffusers_file(state, 3.0))
    header = read_tensors(tmp_path / "d.safetensors").metadata
    settings = json.loads(header["lora_adapter_metadata"])
    parts, fields = ("unet", "text_encoder", "text_encoder_2"), ("r", "lora_alpha", "target_modules")
    assert header["format"] == "pt" and set(settings) == {f"{part}.{field}" for part in parts for field in fields}
    assert settings["unet.r"] == 2 and settings["unet.lora_alpha"] == 3
    assert len(settings["unet.target_modules"]) == len(paths(model.unet, ATTENTION))


def test_text_encoder_names_always_hold_text_model(tmp_path):
    model = tiny("sdxl")
    state = text_lora(model)
    flat = {key.replace("text_encoder.text_model.", "text_encoder."): tensor for key, tensor in state.items()}
    assert flat != state and kohya_file(flat, 4.0, family="sdxl") == kohya_file(state, 4.0, family="sdxl")
    write_file(tmp_path / "k.safetensors", kohya_file(flat, 4.0, family="sdxl"))
    stems = {key.split(".")[0] for key in read_tensors(tmp_path / "k.safetensors").tensors}
    assert len(stems) == len(state) // 2
    assert all(stem.startswith(("lora_te1_text_model_encoder_", "lora_te2_text_model_encoder_")) for stem in stems)


def test_kohya_file_has_the_shapes_and_alphas_that_kohyas_tools_write(tmp_path):
    model = tiny("sd1")
    state = random_lora(paths(model.unet), rank=3)
    write_file(tmp_path / "k.safetensors", kohya_file(state, 6.0, family="sd1"))
    found = read_tensors(tmp_path / "k.safetensors").tensors
    stem = "lora_unet_down_blocks_0_attentions_0_proj_in"  # a 1×1 convolution in SD 1.x
    assert found[f"{stem}.lora_down.weight"].shape == (3, 16, 1, 1)
    assert found[f"{stem}.lora_up.weight"].shape == (16, 3, 1, 1)
    stem = "lora_unet_down_blocks_0_resnets_0_conv1"
    assert found[f"{stem}.lora_down.weight"].shape == (3, 16, 3, 3)
    assert found[f"{stem}.lora_up.weight"].shape == (16, 3, 1, 1)
    alphas = [tensor for key, tensor in found.items() if key.endswith(".alpha")]
    assert len(alphas) == len(state) // 2 and all(alpha.shape == () and alpha == 3 for alpha in alphas)
    up = state["unet.down_blocks.0.resnets.0.conv1.lora_B.weight"]
    assert torch.equal(found[f"{stem}.lora_up.weight"], 2 * up)


@pytest.mark.parametrize("name", ["sd1", "sd2v", "sdxl"])
def test_both_files_are_read_back(tmp_path, name):
    model = tiny(name)
    state = random_lora(paths(model.unet)) | text_lora(model)
    write_file(tmp_path / "d.safetensors", diffusers_file(state, 2.0))
    write_file(tmp_path / "k.safetensors", kohya_file(state, 2.0, family=model.family))
    ours, theirs = read_adapter_file(tmp_path / "d.safetensors"), read_adapter_file(tmp_path / "k.safetensors")
    assert (ours.layout, ours.rank, ours.alpha) == ("peft", 4, 2.0)
    assert (theirs.layout, theirs.rank, theirs.alpha) == ("kohya", 4, 4.0)
    assert ours.state.keys() == theirs.state.keys() == state.keys()
    for key, tensor in state.items():
        assert torch.equal(ours.state[key], tensor)
        assert torch.equal(theirs.state[key], tensor * (0.5 if "lora_B" in key else 1))  # alpha / rank, a power of two


def test_mixed_ranks_and_alphas_become_one_without_changing_any_weight_update(tmp_path):
    """kohya's dynamic ranks and alphas per module, which diffusers loads with wrong factors alpha / r."""
    a, b = torch.randn(2, 6), torch.randn(5, 2)
    c, d = torch.randn(4, 6), torch.randn(5, 4)
    content = {
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight": a,
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.lora_up.weight": b,
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.alpha": torch.tensor(6.0),
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_k.lora_down.weight": c,
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_k.lora_up.weight": d,
    }
    save_file(content, tmp_path / "k.safetensors")
    found = read_adapter_file(tmp_path / "k.safetensors")
    assert (found.rank, found.alpha) == (4, 4.0)
    stem = "unet.mid_block.attentions.0.transformer_blocks.0.attn1"
    made = {m: up @ down for m, (down, up) in factor_pairs(found.state).items()}
    # fp32: a product of two numbers near 1, scaled before instead of after
    torch.testing.assert_close(made[f"{stem}.to_q"], 3 * (b @ a), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(made[f"{stem}.to_k"], d @ c, atol=1e-6, rtol=1e-6)


def test_family_follows_from_the_width_of_the_text():
    key = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight"
    found = {width: family_of({key: torch.zeros(4, width)}) for width in (768, 1024, 2048, 32)}
    assert found == {768: "sd1", 1024: "sd2", 2048: "sdxl", 32: None}
    assert family_of({"text_encoder_2.text_model.encoder.layers.0.mlp.fc1.lora_A.weight": torch.zeros(4, 8)}) == "sdxl"


def test_metadata_by_which_programs_sort_a_file():
    base = {"name": "b", "prediction_type": "v_prediction"}
    info = {"caption": "a cat", "config": {"seed": 3, "max_train_steps": 250}, "base": base, "updates": 40,
            "size": [64, 96], "mixed_precision": "bf16"}  # fmt: skip
    about = {family: kohya_metadata(title="t", family=family, rank=4, info=info) for family in ("sd1", "sd2", "sdxl")}
    assert [about[f]["ss_base_model_version"] for f in about] == ["sd_v1", "sd_v2_v", "sdxl_base_v1-0"]
    assert [about[f]["ss_v2"] for f in about] == ["False", "True", "False"]
    assert [about[f]["modelspec.architecture"] for f in about] == [
        "stable-diffusion-v1/lora",
        "stable-diffusion-v2-768-v/lora",
        "stable-diffusion-xl-v1-base/lora",
    ]
    assert about["sd1"]["ss_seed"] == "3" and about["sd1"]["modelspec.resolution"] == "96x64"
    assert about["sd1"]["ss_resolution"] == "(96, 64)" and about["sd1"]["ss_mixed_precision"] == "bf16"
    # those that were made: of a checkpoint, or of a training that was ended, not all that were planned
    assert (about["sd1"]["ss_steps"], about["sd1"]["ss_max_train_steps"]) == ("40", "250")
    assert all(isinstance(value, str) for value in about["sd1"].values())
    assert not any("date" in key or "_at" in key for key in about["sd1"])
    assert kohya_metadata(title="t", family="sd1", rank=4, info=info | {"date": "2025-01-01"})["modelspec.date"]


def pair(rank=2, width=4):
    return {"unet.conv_in.lora_A.weight": torch.ones(rank, width), "unet.conv_in.lora_B.weight": torch.ones(3, rank)}


INVALID_STATES = {
    "no LoRA tensor": {"unet.conv_in.weight": torch.ones(2, 2)},
    "only \\['A'\\]": {"unet.conv_in.lora_A.weight": torch.ones(2, 2)},
    "A has rank 3": pair() | {"unet.conv_in.lora_A.weight": torch.ones(3, 4)},
    "not finite": pair() | {"unet.conv_in.lora_A.weight": torch.full((2, 4), float("nan"))},
    "has rank 2, others have 5": {k.replace("conv_in", "a"): v for k, v in pair(5).items()} | pair(2),
    "no LoRA module": {},
}


@pytest.mark.parametrize("message", INVALID_STATES)
def test_invalid_states_are_refused(message):
    for write in (lambda state: diffusers_file(state, 1.0), lambda state: kohya_file(state, 1.0, family="sd1")):
        with pytest.raises(UserError, match=message):
            write(INVALID_STATES[message])


def test_numbers_too_large_for_half_precision_are_refused():
    state = pair() | {"unet.conv_in.lora_B.weight": torch.full((3, 2), 1e5)}
    with pytest.raises(UserError, match="does not fit into torch.float16"):
        kohya_file(state, 2.0, family="sd1", dtype=torch.float16)


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({"lora_unet_conv_in.dora_scale": torch.ones(1)}, {}, "of DoRA lacks A and B"),
        ({"transformer.x.lora_A.weight": torch.ones(1, 1)}, {}, "belongs to no known part"),
        ({}, {}, "no tensors of an adapter"),
        (pair(), {"lora_adapter_metadata": "{"}, "no JSON"),
        (pair(), {"lora_adapter_metadata": "[]"}, "list"),
        (pair(), {"lora_adapter_metadata": '{"unet.lora_alpha": "x"}'}, "alpha 'x'"),
        (pair(), {"lora_adapter_metadata": '{"unet.alpha_pattern": 3}'}, "alpha"),
    ],
)
def test_files_that_are_no_lora(tmp_path, tensors, metadata, message):
    write_file(tmp_path / "x.safetensors", tensor_bytes(tensors, metadata))
    with pytest.raises(UserError, match=message):
        read_adapter_file(tmp_path / "x.safetensors")
