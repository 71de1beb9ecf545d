"""What is read of files of other programs: DoRA of every algorithm, incomplete modules, tokens' words, the base."""

import warnings

import pytest
import torch
from safetensors.torch import save_file

from personalize.adapters.adapter import Adapter
from personalize.adapters.fuse import component_weights, merged_weights
from personalize.errors import Notice, UserError
from personalize.formats.foreign_files import as_lora, read_adapter_file
from personalize.formats.inspection import inspect_file
from personalize.formats.lora_files import factor_pairs
from tests.support.adapter_kinds import KINDS, flat, shapes
from tests.support.tiny import tiny

EXACT = 1e-5  # of the largest weight: products of tens of terms in single precision


@pytest.mark.parametrize("kind", ["LoHa", "LoKr"])
def test_dora_on_loha_and_lokr_is_read_and_merged(tmp_path, kind):
    """LyCORIS' `dora_wd` with `algo=loha`: such files were said to lack A and B.

    W = m ∘ (W₀ + ΔW) / ‖W₀ + ΔW‖, one norm for each output.
    """
    made = KINDS[kind]()
    magnitudes = {module: torch.rand(out, 1) + 0.5 for module, (out, _) in shapes().items()}
    tensors = made.tensors | {f"{flat(module)}.dora_scale": m for module, m in magnitudes.items()}
    save_file({key: t.contiguous() for key, t in tensors.items()}, file := tmp_path / "x.safetensors", made.metadata)
    assert inspect_file(file).readers["personalize"][0] == "partly"  # no LoRA holds it
    merged = merged_weights(tiny("sd1"), Adapter.load(file), any_base=True)["unet"]
    before = component_weights(tiny("sd1"))["unet"]
    for module, magnitude in magnitudes.items():
        name = f"{module.removeprefix('unet.')}.weight"
        whole = before[name].double() + made.updates[module]
        wanted = magnitude * whole / whole.norm(dim=1, keepdim=True)
        assert (merged[name] - wanted).abs().max() < EXACT * wanted.abs().max(), module


@pytest.mark.parametrize(
    ("left_out", "says"), [("hada_w2_b", "of DoRA lacks hada_w1_a and hada_w1_b and hada_w2_a and hada_w2_b"),
                           ("hada_", "of DoRA lacks A and B")]
)  # fmt: skip
def test_dora_without_the_factors_of_its_change_is_refused(tmp_path, left_out, says):
    made = KINDS["LoHa"]()
    tensors = {key: tensor for key, tensor in made.tensors.items() if left_out not in key}
    tensors |= {f"{flat(module)}.dora_scale": torch.ones(out, 1) for module, (out, _) in shapes().items()}
    save_file({key: t.contiguous() for key, t in tensors.items()}, tmp_path / "x.safetensors", made.metadata)
    with pytest.raises(UserError, match=says):
        read_adapter_file(tmp_path / "x.safetensors")


@pytest.mark.parametrize("name", ["<cat>", "cat", "my cat", "<cat>.v2"])
def test_a_file_called_like_its_token_keeps_the_tokens_word(tmp_path, name):
    """`<cat>.safetensors`, which holds the token `<cat>`, gave `<<cat>>`, which no prompt says."""
    save_file({"<cat>": torch.ones(1, 32)}, tmp_path / f"{name}.safetensors")
    assert list(Adapter.load(tmp_path / f"{name}.safetensors").concepts) == ["<cat>"]


@pytest.mark.parametrize(("version", "predicts"), [("sd_v1", None), ("sd_v1_v", "v_prediction")])
def test_what_sd_scripts_say_of_the_prediction_is_kept_for_sd_1_too(tmp_path, version, predicts):
    save_file(KINDS["LoRA, kohya's names"]().tensors, file := tmp_path / "x.safetensors",
              {"ss_base_model_version": version, "ss_v2": "False"})  # fmt: skip
    assert read_adapter_file(file).base.get("prediction_type") == predicts


def test_a_file_of_peft_without_its_settings_says_that_its_alpha_is_not_known(tmp_path):
    """Copied out of its folder, it was taken at strength 1 without a word: here 4 was trained."""
    made = KINDS["PEFT folder"]()
    with warnings.catch_warnings(action="error", category=Notice):
        whole = read_adapter_file(made.write(tmp_path / "whole"))
        save_file(made.tensors, alone := tmp_path / "alone.safetensors")
        assert any("nothing says what alpha is" in problem for problem in inspect_file(alone).problems)
    with pytest.warns(Notice, match="adapter_config.json, which is not beside it: alpha is taken for the rank"):
        lost = read_adapter_file(alone)
    key = next(key for key in lost.state if key.endswith("attn1.to_k.lora_B.weight"))
    strength = 8 / 4**0.5  # alpha / √r by the settings
    assert lost.alpha == lost.rank and torch.allclose(whole.state[key], strength * lost.state[key])


@pytest.mark.parametrize("kind", ["LoRA, kohya's names", "LoHa"])
@pytest.mark.parametrize(
    ("stored", "strength"),
    [(torch.tensor([2]), 0.5), (torch.tensor(2.0).bfloat16(), 0.5), (torch.full((4,), 2.0), None)],
    ids=["one whole number", "bf16", "several"],
)
def test_alpha_is_one_number_of_any_type_and_shape(tmp_path, kind, stored, strength):
    """One of several numbers was passed over, and alpha taken for the rank: twice what was trained."""
    made = KINDS[kind]()
    tensors = {key: stored.clone() if key.endswith(".alpha") else t for key, t in made.tensors.items()}
    save_file({key: t.contiguous() for key, t in tensors.items()}, file := tmp_path / "x.safetensors", made.metadata)
    if strength is None:
        with pytest.raises(UserError, match=r"has an alpha of shape \(4,\): one number was expected"):
            read_adapter_file(file)
        assert inspect_file(file).readers["personalize"][0] == "no"
    else:
        found = as_lora(read_adapter_file(file))[0]
        (module, (a, b)) = next(iter(factor_pairs(found.state).items()))
        update = found.alpha / found.rank * (b.double() @ a.double())
        right = made.updates[module] / (1 if kind != "LoHa" else 8)  # whose file says 16 of rank 2
        assert (update - right).abs().max() < EXACT * right.abs().max()


def test_a_pickle_is_refused_with_what_to_do_wherever_it_is_named(tmp_path):
    """`edit` and `export` advised --allow_pickle, which `inspect` and `convert` alone have."""
    torch.save({"<cat>": torch.ones(2, 768)}, tmp_path / "learned_embeds.bin")
    with pytest.raises(UserError, match="let `personalize convert --allow_pickle` make one of its tensors alone"):
        Adapter.load(tmp_path / "learned_embeds.bin")
