"""Adapters as PEFT and diffusers save them change the weights as those libraries' own loaders and merges do."""

import json

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import save_file

from personalize.formats.diffusion_transformers.reading import identify, read
from personalize.formats.foreign_files import read_adapter_file
from personalize.formats.lora_files import factor_pairs
from personalize.io.tensor_files import read_tensors
from tests.formats.test_conversion import convert, deltas
from tests.support.foreign_files import delta
from tests.support.tiny import tiny_pipeline
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
