"""LoRA scaled at run time: what forgetting resets and what it leaves, without a trace."""

import math
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

from personalize.adapters import lora, lora_scales
from personalize.adapters.forgetting import RULES, parse_rule
from personalize.errors import UserError
from personalize.models.stable_diffusion import StableDiffusion
from tests.support.lora_modules import ZEROED, answer, chosen, filled, modules
from tests.support.tiny import tiny_sd1


@pytest.fixture(scope="module")
def adapted() -> StableDiffusion:
    """One for all tests that use nothing but contexts on it; alpha / rank is no binary fraction."""
    return filled(tiny_sd1(), rank=3, alpha=1.0)


def test_forgedit_c11_all_forgotten_is_the_base_none_is_the_adapter(adapted: StableDiffusion) -> None:
    base, learned = answer(tiny_sd1()), answer(adapted)
    assert not torch.equal(learned, base)
    with lora_scales.scaled(adapted.unet, [RULES["noencoder"], RULES["nodecoder"]]):
        assert torch.equal(answer(adapted), base)
    with lora_scales.scaled(adapted.unet, [parse_rule("decoder=1"), parse_rule("encoder=1")]):
        assert torch.equal(answer(adapted), learned)
    with lora_scales.lora_disabled(adapted.unet):
        assert torch.equal(answer(adapted), base)
    with lora_scales.scaled(adapted.unet, strength=0.0):
        assert torch.equal(answer(adapted), base)
    assert torch.equal(answer(adapted), learned)


def test_forgedit_c12_middle_block_is_outside_both_sides() -> None:
    model = tiny_sd1()
    base = answer(model)
    middle = [name for name in dict(lora.leaf_modules(model.unet)) if name.startswith("mid_block.")]
    parameters = lora.add_lora(model.unet, [*lora.module_names(model.unet), *middle], 2, 2, seed=0)
    with torch.no_grad():
        for b in parameters[1::2]:
            b.fill_(0.05)
    sides = [RULES["noencoder"], RULES["nodecoder"]]
    with lora_scales.scaled(model.unet, sides):
        assert not torch.equal(answer(model), base)
    with lora_scales.scaled(model.unet, [*sides, RULES["nomiddle"]]):
        assert torch.equal(answer(model), base)


def test_forgedit_c13_half_degree_is_the_mean_weight(adapted: StableDiffusion) -> None:
    name, layer = next(item for item in lora.lora_layers(adapted.unet).items() if "to_k" in item[0])
    weight, learned = layer.get_base_layer().weight, delta(layer)  # pyright: ignore
    with lora_scales.scaled(adapted.unet, {name: 0.5}):
        half = weight + delta(layer)
    assert (half - (weight + (weight + learned)) / 2).abs().max() <= 1e-6


def delta(layer: LoraLayer) -> Tensor:
    return layer.get_delta_weight(lora.ADAPTER).detach()  # pyright: ignore


def test_forgedit_c14_full_weight_reset_gives_the_same_output(adapted: StableDiffusion) -> None:
    deltas = {name: delta(layer) for name, layer in lora.lora_layers(adapted.unet).items()}
    full = tiny_sd1()
    base = {name: full.unet.get_submodule(name).weight.detach().clone() for name in deltas}  # pyright: ignore
    for rule in ZEROED:
        with lora_scales.scaled(adapted.unet, RULES[rule]):
            scaled = answer(adapted)
        forgotten = chosen(adapted.unet, rule)
        with torch.no_grad():
            for name, change in deltas.items():
                kept = base[name] if name in forgotten else base[name] + change
                full.unet.get_submodule(name).weight.copy_(kept)  # pyright: ignore
        # fp32: (W + BA)x against Wx + B(Ax)
        assert (answer(full) - scaled).abs().max() <= 1e-5 * scaled.abs().max()


def test_forgedit_c15_contexts_leave_no_trace(adapted: StableDiffusion) -> None:
    unet = adapted.unet
    scales = {name: dict(layer.scaling) for name, layer in lora.lora_layers(unet).items()}
    before, tensors, output = modules(unet), lora.lora_state(unet), answer(adapted)

    def forgotten(*rules: str) -> Tensor:
        with lora_scales.scaled(unet, [RULES[rule] for rule in rules]):
            return answer(adapted)

    assert torch.equal(forgotten("encoderattn"), forgotten("encoderattn", "encoderattn"))
    both = forgotten("decoderkv", "encoderattn")
    assert torch.equal(forgotten("encoderattn", "decoderkv"), both)
    with lora_scales.scaled(unet, RULES["encoderattn"]), lora_scales.scaled(unet, RULES["decoderkv"]):
        assert torch.equal(answer(adapted), both)
    with pytest.raises(RuntimeError), lora_scales.scaled(unet, RULES["nodecoder"], strength=0.3):
        raise RuntimeError
    with pytest.raises(RuntimeError), lora_scales.lora_disabled(unet):
        raise RuntimeError
    assert {name: dict(layer.scaling) for name, layer in lora.lora_layers(unet).items()} == scales
    assert modules(unet) == before and torch.equal(answer(adapted), output)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in lora.lora_state(unet).items())
    assert all(p.requires_grad for layer in lora.lora_layers(unet).values() for p in lora._pair(layer))


def test_forgedit_c16_attention_only_trap() -> None:
    model = filled(tiny_sd1(), targets="attention")
    learned = answer(model)
    with pytest.raises(UserError, match="all attention"), lora_scales.scaled(model.unet, RULES["decoderattn"]):
        pass
    # the naive variant runs through without a word and changes nothing
    assert not chosen(model.unet, "decoderattn", "attention")
    with lora_scales.scaled(model.unet, RULES["nodecodercrossattn"]):
        assert not torch.equal(answer(model), learned)


def test_forgedit_c17_both_guidance_branches_see_the_forgotten_weights(adapted: StableDiffusion) -> None:
    name, layer = next(item for item in lora.lora_layers(adapted.unet).items() if item[0].startswith("up_blocks.1"))
    seen: list[tuple[int, float]] = []
    handle = layer.register_forward_pre_hook(
        lambda module, args: seen.append((len(args[0]), module.scaling[lora.ADAPTER]))
    )
    with lora_scales.scaled(adapted.unet, RULES["nodecoder"]):
        answer(adapted)  # a batch of two: unconditional and conditional
    handle.remove()
    assert name.startswith("up_blocks.1") and seen == [(2, 0.0)]


def test_forgedit_c29_encoder_reset_restores_encoder_activations(adapted: StableDiffusion) -> None:
    features: list[Tensor] = []

    def middle(model: StableDiffusion) -> Tensor:
        handle = model.unet.mid_block.register_forward_pre_hook(lambda _, args: features.append(args[0]))
        answer(model)
        handle.remove()
        return features[-1]

    base = middle(tiny_sd1())
    with lora_scales.scaled(adapted.unet, RULES["noencoder"]):
        assert torch.equal(middle(adapted), base)
    with lora_scales.scaled(adapted.unet, RULES["nodecoder"]):
        assert not torch.allclose(middle(adapted), base, rtol=1e-2)


def test_forgedit_c30_baked_is_scaled() -> None:
    model = filled(tiny_sd1())
    rules = [parse_rule("encoderkv"), parse_rule("decoder=0.25")]
    with lora_scales.scaled(model.unet, rules, strength=0.8):
        expected = answer(model)
    state = lora_scales.scaled_state(model.unet, lora.lora_state(model.unet), rules, strength=0.8)
    lora.remove_lora(model.unet)
    lora.load_lora(model.unet, state, rank=2, alpha=3.0)
    assert len(lora.lora_layers(model.unet)) == 216 - 62
    assert (answer(model) - expected).abs().max() <= 1e-5 * expected.abs().max()  # s·(Bx) against (sB)x


@pytest.mark.parametrize("factor", [math.nan, math.inf, 1e30, "1"])
def test_factors_of_modules_are_numbers(adapted: StableDiffusion, factor: Any) -> None:
    name = lora.module_names(adapted.unet)[0]
    with pytest.raises(UserError, match=f"the factor of module '{name}' is"):
        with lora_scales.scaled(adapted.unet, {name: factor}):
            raise AssertionError("the body ran")
