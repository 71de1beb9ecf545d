"""A base in 4 bits: what is small, what stays, and that adapters still learn on it."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from personalize.adapters.lora import add_lora, lora_layers, module_names
from personalize.errors import UserError
from personalize.models.loading import CONFIGS
from personalize.models.quantization import NOT_QUANTIZED, _linear, quantize, weight_bytes
from personalize.models.stable_diffusion import StableDiffusion
from tests.support.tiny import tiny, tiny_sd1

bnb = pytest.importorskip("bitsandbytes")


def half(name: str = "sd1") -> StableDiffusion:
    model = tiny(name)
    model.unet.to(torch.bfloat16)
    return model


def output(model: StableDiffusion) -> torch.Tensor:
    latents = torch.linspace(-1, 1, 2 * 4 * 64).view(2, 4, 8, 8)
    with torch.no_grad():
        conditioning = model.prompts(["a cat", "a dog"], (32, 32))
    return model.predict(latents, torch.tensor([10, 700]), conditioning)


def test_linear_layers_are_nf4_and_the_rest_is_as_it_was() -> None:
    model = half()
    linear = {path: layer.weight.numel() for path, layer in model.unet.named_modules() if type(layer) is nn.Linear}
    identity, bytes_before = model.identity, weight_bytes(model.unet)
    with torch.no_grad():
        exact = output(model)
    before, after = model.quantize()
    small = {path for path, layer in model.unet.named_modules() if isinstance(layer, bnb.nn.Linear4bit)}
    assert small == {path for path in linear if not any(part in path for part in NOT_QUANTIZED)}
    assert all(model.unet.get_submodule(path).weight.quant_type == "nf4" for path in small)
    assert model.dtype == torch.bfloat16 and all(
        layer.weight.dtype == torch.bfloat16 for layer in model.unet.modules() if isinstance(layer, nn.Conv2d)
    )
    assert before == bytes_before and after == weight_bytes(model.unet)
    # two bytes become half a byte; a scale of one byte to every 64, and tables of 1.1 kB to every layer, on top
    saved = sum(1.5 * linear[path] - linear[path] / 64 - 1.1e3 for path in small)
    assert before - after == pytest.approx(saved, rel=0.02)
    assert model.identity == identity and model.about()["quantisation"] == "nf4"
    with torch.no_grad():
        near = output(model)
    assert 0 < (near - exact).norm() / exact.norm() < 0.15  # measured: 0.06; NF4's rounding is 5 to 10 %


@pytest.mark.parametrize(("family", "small", "whole"), [("sd15", 242_196_480, 859_520_964),
                                                         ("sdxl", 2_207_744_000, 2_567_463_684)])  # fmt: skip
def test_what_there_is_to_save_on_real_bases(family: str, small: int, whole: int) -> None:
    """28 % of the weights on SD 1.5, 86 % on SDXL: from 1.72 to 1.36 GB, and from 5.13 to 1.86."""
    with torch.device("meta"):
        config = json.loads((CONFIGS / family / "unet" / "config.json").read_text())
        unet = UNet2DConditionModel.from_config(config)
    assert sum(layer.weight.numel() for _, layer in _linear(unet)) == small
    assert sum(parameter.numel() for parameter in unet.parameters()) == whole


def test_adapters_are_fp32_and_gradients_pass_also_after_drawing() -> None:
    model = half()
    model.quantize()
    add_lora(model.unet, module_names(model.unet), 2, 2.0, 0)
    layers = lora_layers(model.unet)
    assert len(layers) == 216
    for drawn in (False, True):
        if drawn:
            with torch.no_grad():
                output(model)
        output(model).square().sum().backward()
        for name, layer in layers.items():
            b = layer.lora_B["personalize"].weight
            assert b.dtype == torch.float32 and b.grad is not None and bool(b.grad.any()), (name, drawn)
            b.grad = None


@pytest.mark.filterwarnings("ignore")
def test_the_naive_layer_hands_no_gradient_back_once_it_has_drawn() -> None:
    """It repacks its weights in the first pass without gradient, into a form that has no backward pass."""
    layer = bnb.nn.Linear4bit(64, 64, False, torch.bfloat16, quant_type="nf4").to("cpu").eval()
    if not layer.support_avx512bf16_for_cpu:
        pytest.skip("only on CPUs with AVX512-BF16")
    x = torch.randn(4, 64, dtype=torch.bfloat16, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None and bool(x.grad.any())
    x.grad = None
    with torch.no_grad():
        layer(x.detach())
    layer(x).sum().backward()
    assert x.grad is None or not x.grad.any()


def test_without_the_package_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.nn", None)
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        quantize(tiny_sd1().unet)
