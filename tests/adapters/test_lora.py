"""The adapter inside the UNet: which modules, added and removed without a trace, exact names, independent starts."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft.tuners.lora import LoraLayer

from personalize.adapters import lora, lora_scales
from personalize.errors import UserError
from tests.support.lora_modules import ZEROED, answer, chosen, fill, filled, modules
from tests.support.tiny import tiny, tiny_sd1

SDXL = {
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
REAL = {
    "sd1": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "sd2": {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True},
    "sdxl": SDXL,
}


@pytest.fixture(scope="module")
def real() -> dict[str, UNet2DConditionModel]:
    with torch.device("meta"):
        return {family: UNet2DConditionModel(**config) for family, config in REAL.items()}  # pyright: ignore


def test_forgedit_c01_real_architectures(real: dict) -> None:
    sizes = {family: sum(p.numel() for p in unet.parameters()) for family, unet in real.items()}
    assert sizes == {"sd1": 859_520_964, "sd2": 865_910_724, "sdxl": 2_567_463_684}
    for family, full, attention in (("sd1", 216, 104), ("sd2", 216, 104), ("sdxl", 661, 480)):
        assert len(lora.module_names(real[family], family)) == full
        assert len(lora.module_names(real[family], family, "attention")) == attention
    blocks = {tuple(name.split(".")[:2]) for name in lora.module_names(real["sd1"])}
    trained = [p.numel() for name, p in real["sd1"].named_parameters() if tuple(name.split(".")[:2]) in blocks]
    assert sum(trained) == 587_642_560  # what the published method trains in full


def test_forgedit_c01_rank_16_sizes(real: dict) -> None:
    for family, expected in (("sd1", 12_254_208), ("sdxl", 40_888_320)):
        leaves = dict(real[family].named_modules())
        layers = [leaves[name].weight for name in lora.module_names(real[family])]
        assert sum(16 * (w[0].numel() + w.shape[0]) for w in layers) == expected


@pytest.mark.parametrize("rule", ZEROED)
def test_forgedit_c02_modules_of_each_rule(real: dict, rule: str) -> None:
    assert (len(chosen(real["sd1"], rule)), len(chosen(real["sd1"], rule, "attention"))) == ZEROED[rule]


@pytest.mark.parametrize("family", REAL)
def test_forgedit_c02_chains_and_sides(real: dict, family: str) -> None:
    for side, stage in (("encoder", "encoder1"), ("decoder", "decoder2")):
        sets = [chosen(real[family], rule) for rule in (f"{side}attn+{stage}", f"{side}attn", f"{side}kv", f"no{side}")]
        assert sets[0] < sets[1] < sets[2] < sets[3]
    assert not chosen(real[family], "noencoder") & chosen(real[family], "nodecoder")


def test_forgedit_c05_stages_are_mapped_by_role_not_by_index(real: dict) -> None:
    kept = chosen(real["sdxl"], "decoderattn") - chosen(real["sdxl"], "decoderattn+decoder2")
    assert {name[:12] for name in kept} == {"up_blocks.1."}
    kept = chosen(real["sdxl"], "encoderattn") - chosen(real["sdxl"], "encoderattn+encoder1")
    assert {name[:14] for name in kept} == {"down_blocks.1."}
    sdxl = lora.module_names(real["sdxl"])
    assert {name.split(".")[1] for name in sdxl if name.startswith("up")} == {"0", "1"}
    # the naive variant, SD 1.x indices on SDXL, loses its main decoder stage
    assert sum(name.startswith("up_blocks.0.") for name in sdxl) > 0.4 * len(sdxl)
    assert {name[:24] for name in chosen(real["sdxl"], "nostyle")} == {"up_blocks.0.attentions.1"}
    assert {name[:26] for name in chosen(real["sdxl"], "nolayout")} == {"down_blocks.2.attentions.1"}


@pytest.mark.parametrize("name", ["sd1", pytest.param("sd2v", marks=pytest.mark.slow), "sdxl"])
def test_added_saved_loaded_and_removed_without_a_trace(name: str) -> None:
    model = tiny(name)
    flags = [p.requires_grad for p in model.unet.parameters()]
    before, output, attributes = modules(model.unet), answer(model), set(vars(model.unet))
    random_state = torch.get_rng_state()
    names = lora.module_names(model.unet)[:: 4 if name == "sdxl" else 1]  # injecting 661 modules takes seconds
    parameters = lora.add_lora(model.unet, names, 2, 3.0, seed=0)
    assert torch.equal(torch.get_rng_state(), random_state)  # nothing drawn from global state
    assert len(parameters) == 2 * len(lora.lora_layers(model.unet)) and {p.dtype for p in parameters} == {torch.float32}
    assert all(p.requires_grad for p in parameters) and torch.equal(answer(model), output)  # B is zero
    fill(model)
    state, learned = lora.lora_state(model.unet), answer(model)
    assert all(key.startswith("unet.") and key.endswith(("lora_A.weight", "lora_B.weight")) for key in state)
    lora.remove_lora(model.unet)
    assert torch.equal(answer(model), output)
    lora.load_lora(model.unet, state, rank=2, alpha=3.0)
    # not bit-equal: torch multiplies by weights that want a gradient in another order
    assert (answer(model) - learned).abs().max() <= 1e-5 * learned.abs().max()
    assert not any(p.requires_grad for layer in lora.lora_layers(model.unet).values() for p in lora._pair(layer))
    lora.remove_lora(model.unet)
    assert modules(model.unet) == before and set(vars(model.unet)) == attributes
    assert [p.requires_grad for p in model.unet.parameters()] == flags
    assert torch.equal(answer(model), output)


def test_names_are_the_same_with_and_without_an_adapter() -> None:
    model = tiny_sd1()
    bare = lora.module_names(model.unet)
    lora.add_lora(model.unet, bare, 2, 2, seed=0)
    assert lora.module_names(model.unet) == bare == list(lora.lora_layers(model.unet))


def test_start_depends_on_the_seed_and_the_name_alone() -> None:
    one, other, third = (tiny_sd1().unet for _ in range(3))
    names = lora.module_names(one)
    lora.add_lora(one, names, 2, 2, seed=0)
    lora.add_lora(other, names[::-1][:50], 2, 2, seed=0)
    lora.add_lora(third, names[-1:], 2, 2, seed=1)
    state, key = lora.lora_state(one), f"unet.{names[-1]}.lora_A.weight"
    assert all(torch.equal(tensor, state[name]) for name, tensor in lora.lora_state(other).items())
    assert not torch.equal(lora.lora_state(third)[key], state[key])
    a = state[key]
    assert a.abs().max() <= a[0].numel() ** -0.5 and a.std() > 0.5 * a[0].numel() ** -0.5  # U(±b): std b/√3 = 0.58 b


def test_bad_states_are_refused_and_leave_nothing_behind() -> None:
    model = filled(tiny_sd1())
    state = lora.lora_state(model.unet)
    with pytest.raises(UserError, match="already carries an adapter"):
        lora.load_lora(model.unet, state, 2, 3.0)
    lora.remove_lora(model.unet)
    before, key = modules(model.unet), next(iter(state))
    for broken, message in (
        ({key.replace("down_blocks.1", "down_blocks.7"): state[key], **state}, "missing|no layer"),
        ({k: v for k, v in state.items() if k != key}, "is missing"),
        (state | {key: state[key][:, :3]}, "another base or rank"),
        ({"text_encoder.x.lora_A.weight": state[key]}, "no UNet part"),
    ):
        with pytest.raises(UserError, match=message):
            lora.load_lora(model.unet, broken, 2, 3.0)
        assert modules(model.unet) == before


def test_unknown_names_are_refused() -> None:
    model = tiny_sd1()
    with pytest.raises(UserError, match="targets 'all'"):
        lora.module_names(model.unet, targets="all")
    with pytest.raises(UserError, match="no layer 'up_blocks.9"):
        lora.add_lora(model.unet, ["up_blocks.9.conv"], 2, 2, seed=0)
    with pytest.raises(UserError, match="no adapter to scale"), lora_scales.scaled(model.unet):
        pass
    filled(model)
    with pytest.raises(UserError, match="no module 'x'"), lora_scales.scaled(model.unet, {"x": 0.0}):
        pass
    assert all(isinstance(layer, LoraLayer) for layer in lora.lora_layers(model.unet).values())
