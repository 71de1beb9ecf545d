"""Adapters as PEFT and diffusers save them change the weights as those libraries' own loaders and merges do."""

import json

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from personalize.adapters.adapter import Adapter
from personalize.adapters.fuse import merged_weights
from personalize.errors import UserError
from personalize.formats.diffusion_transformers.reading import identify, read
from personalize.formats.foreign_files import as_lora, read_adapter_file
from personalize.formats.inspection import inspect_file
from personalize.formats.lora_files import factor_pairs
from personalize.formats.verification import verify_file
from personalize.io.tensor_files import read_tensors, tensor_bytes
from tests.formats.test_conversion import convert, deltas
from tests.support.foreign_files import delta
from tests.support.tiny import tiny, tiny_pipeline
from tests.support.transformer_loras import random_pairs, update

EXACT = 1e-5  # of max |ΔW|: sums of tens of products in single precision, in another order


def changes(unet, adapter="default_0"):
    """ΔW (out, in·k·k) by module of the adapter in `unet`, by PEFT's own computation."""
    layers = {path: layer for path, layer in unet.named_modules() if hasattr(layer, "get_delta_weight")}
    return {f"unet.{path}": layer.get_delta_weight(adapter).detach().flatten(1) for path, layer in layers.items()}


def assert_same(found, truth):
    assert found.keys() == truth.keys()
    for module, expected in truth.items():
        assert float((found[module] - expected).abs().max() / expected.abs().max()) < EXACT, module


def of_file(file):
    return {m: delta(a, b, file.alpha / file.rank) for m, (a, b) in factor_pairs(file.state).items()}


def test_a_model_saved_without_its_pipeline_has_its_own_alpha(tmp_path):
    """`unet.save_lora_adapter` writes neither keys nor settings with "unet." before them."""
    torch.manual_seed(0)
    saved, loaded = tiny_pipeline("sd1").unet, tiny_pipeline("sd1").unet
    saved.add_adapter(LoraConfig(r=4, lora_alpha=16, target_modules=["to_q", "to_k"], init_lora_weights=False))
    saved.save_lora_adapter(tmp_path / "a")
    file = tmp_path / "a" / "pytorch_lora_weights.safetensors"
    assert json.loads(read_tensors(file).metadata["lora_adapter_metadata"])["lora_alpha"] == 16
    loaded.load_lora_adapter(str(tmp_path / "a"), prefix=None, weight_name=file.name)
    truth = changes(loaded)
    assert_same(of_file(read_adapter_file(file)), truth)
    written = convert(file, "kohya", tmp_path / "k.safetensors", family="sd1")  # read a second time on the way
    assert_same(deltas(written, "sd1"), truth)


@pytest.mark.parametrize("targets", [["to_q", "to_k"], r".*\.(to_q|to_k)"])
def test_verify_takes_patterns_and_rank_stabilised_strengths_as_diffusers_does(tmp_path, targets):
    """Files that diffusers loads as they were trained did not verify: one rank and alpha / r were taken for all."""
    torch.manual_seed(0)
    pipe = tiny_pipeline("sd1")
    patterns = {"rank_pattern": {"attn2.to_k": 2}, "alpha_pattern": {r".*attn2\.to_q": 32}}
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, use_rslora=True, init_lora_weights=False, **patterns)
    pipe.unet.add_adapter(config)
    pipe.save_lora_weights(
        tmp_path, unet_lora_layers=get_peft_model_state_dict(pipe.unet),
        unet_lora_adapter_metadata=pipe.unet.peft_config["default"].to_dict(),
    )  # fmt: skip
    file = tmp_path / "pytorch_lora_weights.safetensors"
    report = verify_file(file, tiny("sd1"))
    assert report.ok and len(report.files) == 2, report
    content = read_tensors(file)
    changed = {**json.loads(content.metadata["lora_adapter_metadata"]), "unet.rank_pattern": {"attn2.to_k": 3}}
    file.write_bytes(tensor_bytes(content.tensors, {"lora_adapter_metadata": json.dumps(changed)}))
    assert "has rank 2, the metadata says 3" in str(verify_file(file, tiny("sd1")))


def dora(folder):
    """A UNet's DoRA on linear layers and convolutions, saved through its pipeline."""
    torch.manual_seed(0)
    pipe = tiny_pipeline("sd1")
    wanted = ["conv1", "conv2", "to_q", "proj_in", "conv_out"]
    pipe.unet.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=wanted, use_dora=True, init_lora_weights=False))
    for name, parameter in pipe.unet.named_parameters():
        if "magnitude" in name:
            parameter.data.mul_(1 + 0.3 * torch.rand_like(parameter))
    state, settings = get_peft_model_state_dict(pipe.unet), pipe.unet.peft_config["default"].to_dict()
    pipe.save_lora_weights(folder, unet_lora_layers=state, unet_lora_adapter_metadata=settings)
    return folder / "pytorch_lora_weights.safetensors"


def test_dora_of_convolutions_has_one_norm_for_each_output(tmp_path):
    """PEFT's magnitude of a convolution is (1, out, 1, 1), also where the layer has as many inputs as outputs."""
    file, pipe = dora(tmp_path), tiny_pipeline("sd1")
    pipe.load_lora_weights(str(tmp_path))
    layers = {path: layer for path, layer in pipe.unet.named_modules() if isinstance(layer, LoraLayer)}
    for layer in layers.values():
        layer.merge()
    found = merged_weights(tiny("sd1"), Adapter.load(file), any_base=True)["unet"]
    assert {layer.get_base_layer().weight.ndim for layer in layers.values()} == {2, 4}
    for path, layer in layers.items():
        truth = layer.get_base_layer().weight.detach()
        assert float((found[f"{path}.weight"] - truth).abs().max() / truth.abs().max()) < EXACT, path


def trained_from(init, folder):
    """A LoRA that PEFT started with factors of the base, saved as it is and as a plain LoRA, and its true ΔW."""
    torch.manual_seed(0)
    unet = tiny_pipeline("sd1").unet
    before = {name: weight.clone() for name, weight in unet.state_dict().items()}
    model = get_peft_model(unet, LoraConfig(r=4, lora_alpha=6, target_modules=["to_q"], init_lora_weights=init))
    model.peft_config["default"].init_lora_weights = True  # PEFT's own recipe, for the adapter before training alone
    model.save_pretrained(folder / "start")
    model.peft_config["default"].init_lora_weights = init
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder / "as_it_is")
    model.save_pretrained(folder / "plain", path_initial_model_for_weight_conversion=str(folder / "start"))
    after = model.merge_and_unload().state_dict()
    return {
        f"unet.{name.removesuffix('.weight')}": (after[name] - before[name]).flatten(1)
        for name in after if not torch.equal(after[name], before[name])
    }  # fmt: skip


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_adapters_that_change_the_base_are_refused_unless_they_were_saved_as_plain_ones(tmp_path, init):
    truth = trained_from(init, tmp_path)
    for read_it in (read_adapter_file, Adapter.load):
        with pytest.raises(UserError, match=f"{init}'.*path_initial_model_for_weight_conversion") as caught:
            read_it(tmp_path / "as_it_is")
        assert "\n" not in str(caught.value)
    found = inspect_file(tmp_path / "as_it_is")
    assert found.readers["personalize"][0] == "no" and any(
        "no change of the original base" in p for p in found.problems
    )
    plain = of_file(read_adapter_file(tmp_path / "plain"))
    assert plain.keys() == truth.keys() and inspect_file(tmp_path / "plain").readers["personalize"] == ("yes", "")
    for module, change in truth.items():
        # The truth is a difference of weights near 1 in single precision, after they were taken apart and put together.
        assert float((plain[module] - change).abs().max()) < 1e-5 < 0.01 < float(change.abs().max())


@pytest.mark.parametrize(
    "start", ["pissa_niter_16", "corda", "loftq", "LoRA_GA", "gaussian", "eva", "orthogonal", True]
)
def test_the_settings_that_diffusers_saves_are_read_alike(tmp_path, start):
    tensors = {f"unet.mid_block.attentions.0.proj_in.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}
    settings = {"unet.r": 2, "unet.lora_alpha": 2, "unet.init_lora_weights": start}
    save_file(tensors, tmp_path / "x.safetensors", {"lora_adapter_metadata": json.dumps(settings)})
    if start in ("gaussian", "eva", "orthogonal", True):  # these leave the base as it is
        assert read_adapter_file(tmp_path / "x.safetensors", family="sd1").rank == 2
        return
    with pytest.raises(UserError, match="changes the base's weights as well"):
        read_adapter_file(tmp_path / "x.safetensors", family="sd1")


LYCORIS = {
    "LoHa": (LoHaConfig, {"r": 2, "alpha": 8}),
    "LoHa of a high rank": (LoHaConfig, {"r": 64, "alpha": 8}),
    "LoHa with cores": (LoHaConfig, {"r": 2, "alpha": 8, "use_effective_conv2d": True}),
    "LoHa by patterns": (LoHaConfig, {"r": 2, "alpha": 8, "rank_pattern": {"attn2.to_q": 4}, "alpha_pattern": {
        r".*mid_block.*to_q": 1}}),
    "LoKr": (LoKrConfig, {"r": 2, "alpha": 8}),
    "LoKr whole": (LoKrConfig, {"r": 64, "alpha": 8}),
    "LoKr, both factors": (LoKrConfig, {"r": 2, "alpha": 8, "decompose_both": True, "decompose_factor": 4}),
    "LoKr by patterns": (LoKrConfig, {"r": 2, "alpha": 8, "rank_pattern": {"attn2.to_q": 4}, "alpha_pattern": {
        r".*mid_block.*to_q": 1}}),
}  # fmt: skip


@pytest.mark.parametrize("name", LYCORIS)
def test_loha_and_lokr_of_peft_have_the_strength_of_their_settings(tmp_path, name):
    """PEFT keeps alpha in adapter_config.json, as `alpha`, and multiplies LoKr by alpha / r also where it is whole."""
    torch.manual_seed(0)
    kind, options = LYCORIS[name]
    unet = tiny_pipeline("sd1").unet
    model = get_peft_model(unet, kind(target_modules=["to_q", "conv1"], init_weights=False, **options))
    model.save_pretrained(tmp_path / "in")
    truth = changes(unet, "default")
    assert_same(of_file(as_lora(read_adapter_file(tmp_path / "in", family="sd1"))[0]), truth)
    written = convert(tmp_path / "in", "kohya", tmp_path / "k.safetensors", family="sd1")
    assert_same(deltas(written, "sd1"), truth)
    merged = merged_weights(tiny("sd1"), Adapter.load(tmp_path / "in", family="sd1"), any_base=True)["unet"]
    after = model.merge_and_unload().state_dict()
    for path in truth:
        found, right = (weights[f"{path.removeprefix('unet.')}.weight"] for weights in (merged, after))
        assert float((found - right).abs().max() / right.abs().max()) < EXACT, path


@pytest.mark.parametrize(("prefix", "factor"), [("", 4), ("transformer.", 4), ("text_encoder.", 1)])
def test_settings_without_a_part_are_those_of_a_transformer_too(tmp_path, prefix, factor):
    pairs = random_pairs({"transformer_blocks.0.attn.to_q": torch.Size((3072, 3072))})
    tensors = {
        f"{name.removeprefix('transformer.')}.lora_{side}.weight": tensor.contiguous()
        for name, pair in pairs.items() for side, tensor in zip("AB", pair, strict=True)
    }  # fmt: skip
    settings = {f"{prefix}r": 2, f"{prefix}lora_alpha": 8}
    save_file(tensors, tmp_path / "x.safetensors", {"lora_adapter_metadata": json.dumps(settings)})
    content = read_tensors(tmp_path / "x.safetensors")
    lora = read(tmp_path / "x.safetensors", content, identify(content)[0])
    (found,), (pair,) = lora.pairs.values(), pairs.values()
    assert torch.equal(update(found), factor * update(pair))


@pytest.mark.parametrize("kind", [LoHaConfig, LoKrConfig])
def test_the_state_of_a_model_with_loha_or_lokr_in_it_is_read_without_the_adapters_name(tmp_path, kind):
    """`model.state_dict()` has "….hada_w1_a.default", where PEFT's own files have "….hada_w1_a"."""
    unet = tiny_pipeline("sd1").unet
    model = get_peft_model(unet, kind(r=2, alpha=2, target_modules=["to_q"], init_weights=False))
    state = {key: tensor for key, tensor in model.state_dict().items() if ".default" in key}
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, file := tmp_path / "x.safetensors")
    truth = changes(unet, "default")
    assert_same(of_file(as_lora(read_adapter_file(file, family="sd1"))[0]), truth)
    assert_same(deltas(convert(file, "kohya", tmp_path / "k.safetensors", family="sd1"), "sd1"), truth)


def test_inspect_says_that_diffusers_reads_its_own_dora(tmp_path):
    """It warned of kohya's `dora_scale`, which is not in the file."""
    file = dora(tmp_path)
    tiny_pipeline("sd1").load_lora_weights(str(tmp_path))
    assert inspect_file(file).readers["diffusers"][0] == "yes"
