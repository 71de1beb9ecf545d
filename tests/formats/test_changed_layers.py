"""Changed layers against the package `lycoris-lora`, which wrote the files that people have."""

import pytest
import torch
from torch import nn

from personalize.errors import UserError
from personalize.formats.algorithms import algorithm_of
from personalize.formats.changed_layers import changed
from personalize.formats.weight_changes import NEED_THE_BASE, lora_pair

modules = pytest.importorskip("lycoris.modules")
FP32 = 1e-6
"""Rounding of single precision in weights of about 1, after products of up to a hundred terms."""

LAYERS = {"linear": lambda: nn.Linear(12, 20), "conv": lambda: nn.Conv2d(8, 12, 3), "1x1": lambda: nn.Conv2d(8, 12, 1)}
CASES = {
    "LoCon": (modules.LoConModule, {}),
    "LoCon with a core": (modules.LoConModule, {"use_tucker": True}),
    "LoHa": (modules.LohaModule, {}),
    "LoHa with cores": (modules.LohaModule, {"use_tucker": True}),
    "LoKr": (modules.LokrModule, {}),
    "LoKr, both factors": (modules.LokrModule, {"decompose_both": True, "factor": 2}),
    "LoKr with a core": (modules.LokrModule, {"use_tucker": True}),
    "LoKr, whole": (modules.LokrModule, {"full_matrix": True}),
    "DoRA": (modules.LoConModule, {"weight_decompose": True}),
    "DoRA along the inputs": (modules.LoConModule, {"weight_decompose": True, "wd_on_out": False}),
    "LoHa with DoRA": (modules.LohaModule, {"weight_decompose": True}),
    "GLoRA": (modules.GLoRAModule, {}),
    "(IA)3": (modules.IA3Module, {}),
    "(IA)3 on the inputs": (modules.IA3Module, {"train_on_input": True}),
    "OFT": (modules.DiagOFTModule, {}),
    "OFT, scaled and bounded": (modules.DiagOFTModule, {"rescaled": True, "constraint": 1e-2}),
    "full": (modules.FullModule, {}),
}


def made(name, layer):
    """A random LyCORIS module on a layer: its file's tensors by role, inputs, and what the package makes of them.

    The layer's own forward pass is compared, which is what was trained: in version 4.1.3 merging multiplies the
    strength of LoHa and LoKr twice.
    """
    cls, options = CASES[name]
    torch.manual_seed(0)
    module = cls("x", layer, 1.0, lora_dim=2 if "OFT" not in name else 4, alpha=3.0, **options)
    module.apply_to()
    for key, parameter in module.named_parameters():
        nn.init.uniform_(parameter, 0.5, 1.5) if key in ("dora_scale", "rescale") else nn.init.normal_(
            parameter, std=0.3
        )
    x = torch.randn(5, layer.in_features) if isinstance(layer, nn.Linear) else torch.randn(2, layer.in_channels, 7, 7)
    with torch.no_grad():
        y = layer(x)
    names = {"lora_down.weight": "A", "lora_up.weight": "B", "lora_mid.weight": "mid"}
    parts = {names.get(key, key): tensor.detach().clone() for key, tensor in module.state_dict().items()}
    return parts, x, y


def passed(layer, x, weight, bias):
    """The layer's output with another weight and bias."""
    return (
        nn.functional.linear(x, weight, bias) if isinstance(layer, nn.Linear) else nn.functional.conv2d(x, weight, bias)
    )


def as_read(parts):
    """The tensors as `read_adapter_file` hands them on: a core multiplied into A, and the strength beside them."""
    from personalize.formats.foreign_files import _with_folded_core

    parts = dict(_with_folded_core("x", parts))
    rank = len(parts["A"]) if "A" in parts else 1
    return {**parts, "scale": torch.tensor(float(parts["alpha"]) / rank if "A" in parts else 1.0)}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("name", CASES)
def test_a_layer_changes_as_in_lycoris(name, kind):
    if "core" in name and kind != "conv":
        pytest.skip("LyCORIS makes a core for convolutions of more than one pixel alone")
    layer = LAYERS[kind]().requires_grad_(False)
    before, old_bias = layer.weight.clone(), layer.bias.clone()
    parts, x, y = made(name, layer)
    weight, bias = changed("x", as_read(parts), before, old_bias)
    assert (passed(layer, x, weight, bias) - y).abs().max() < FP32 * y.abs().max()
    assert (passed(layer, x, before, old_bias) - y).abs().max() > 0.1, "the change must be large enough to be seen"


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("name", [name for name in CASES if name.startswith(("LoHa", "LoKr", "full"))])
def test_what_needs_no_base_is_a_lora_exactly(name, kind):
    layer = LAYERS[kind]().requires_grad_(False)
    before, old_bias = layer.weight.clone(), layer.bias.clone()
    parts, x, y = made(name, layer)
    if algorithm_of(parts) in NEED_THE_BASE or ("core" in name and kind != "conv"):
        pytest.skip("needs the base's weights, or is not made by LyCORIS")
    a, b = lora_pair("x", parts, tuple(before.shape[2:]))
    update = (b.flatten(1) @ a.flatten(1)).reshape(before.shape)
    bias = old_bias + parts.get("diff_b", 0)
    assert (passed(layer, x, before + update, bias) - y).abs().max() < FP32 * y.abs().max()
    assert len(a) <= min(len(b), a[0].numel()), "no matrix has a higher rank"
    if name == "LoHa" and kind == "linear":
        assert len(a) == 2 * 2
    if name == "LoKr" and kind == "linear":
        assert len(a) == torch.linalg.matrix_rank(parts["lokr_w1"]) * 2


def test_strength_moves_the_layer_part_of_the_way_and_biases_with_it():
    layer = nn.Linear(4, 4).requires_grad_(False)
    parts = {"diff": torch.ones(4, 4), "diff_b": torch.ones(4), "scale": torch.tensor(1.0)}
    weight, bias = changed("x", parts, layer.weight, layer.bias, 0.5)
    assert torch.allclose(weight, layer.weight + 0.5) and torch.allclose(bias, layer.bias + 0.5)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"diff": torch.ones(5, 5)}, "do not fit"),
        ({"oft_blocks": torch.ones(2, 2, 2, 2)}, "BOFT is not read"),
        ({"set_weight": torch.ones(4, 4)}, "not applied"),
        ({"diff_b": torch.ones(3)}, "do not fit"),
        ({"hada_w1_a": torch.ones(4, 2)}, "lacks"),
    ],
)
def test_changes_that_do_not_fit_are_refused_by_name(parts, message):
    layer = nn.Linear(4, 4).requires_grad_(False)
    with pytest.raises(UserError, match=message):
        changed("module", {**parts, "scale": torch.tensor(1.0)}, layer.weight, layer.bias)
