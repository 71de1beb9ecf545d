"""A small file cannot make large matrices: what its factors multiply out to is compared with the layer first."""

import os

import pytest
import torch

from personalize.adapters.adapter import Adapter
from personalize.errors import UserError
from personalize.formats.coverage import norm_of
from personalize.formats.foreign_files import as_lora, read_adapter_file
from personalize.formats.inspection import inspect_file
from personalize.formats.inspection_report import report
from personalize.formats.layer_kinds import known_paths
from personalize.formats.layer_sizes import FAMILIES, layer_sides, sides_of
from personalize.formats.verification import verify_file
from personalize.formats.weight_changes import lora_pair
from personalize.io.tensor_files import tensor_bytes
from tests.support.children import in_child

LAYER = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"  # (320, 320) of SD 1.x and 2.x
KOHYA = "lora_unet_" + LAYER.removeprefix("unet.").replace(".", "_")
OTHER = KOHYA.replace("to_q", "to_k")
MEMORY = 96  # MiB: twice the largest file here, and what the first use of torch's functions takes
N = 30_000  # (N, N) would take 3.6 GB


@pytest.fixture(scope="module", autouse=True)
def what_is_computed_once():
    """Tables that are kept, so that the forks neither compute them nor count them."""
    assert all(layer_sides(family) and known_paths(family) for family in FAMILIES)


def plain(out, rank, read):
    return {f"{KOHYA}.lora_down.weight": torch.zeros(rank, read), f"{KOHYA}.lora_up.weight": torch.zeros(out, rank)}


def named(**tensors):
    return {f"{KOHYA}.{role}": torch.zeros(*shape) for role, shape in tensors.items()}


def loha(out, rank, read):
    return {
        f"{KOHYA}.hada_w{n}_{x}": torch.zeros(*((out, rank) if x == "a" else (rank, read))) for n in "12" for x in "ab"
    }


HOSTILE = {
    "rank 0": plain(N, 0, N),
    "rank 0 of PEFT": {f"{LAYER}.lora_A.weight": torch.zeros(0, N), f"{LAYER}.lora_B.weight": torch.zeros(N, 0)},
    "sides of 0": plain(0, N, 0),
    "a layer of 30,000": plain(N, 1, N),
    "a layer of 30,000 by 1": plain(N, 1, 1),
    "LoHa": loha(N, 1, N),
    "LoHa of rank 0": loha(N, 0, N),
    "LoKr": named(lokr_w1=(200, 200), lokr_w2=(200, 200)),
    "LoKr in parts": named(lokr_w1=(1, 1), lokr_w2_a=(N, 1), lokr_w2_b=(1, N)),
    "full difference": named(diff=(N, 0)),
    "core": named(
        **{"lora_mid.weight": (1, 1, 90, 90), "lora_down.weight": (1, N, 1, 1), "lora_up.weight": (9, 1, 1, 1)}
    ),
}  # fmt: skip


def everything(path):
    """Whatever the commands do with one file."""
    for call in (
        lambda: report(inspect_file(path)), lambda: verify_file(path), lambda: as_lora(read_adapter_file(path)),
        lambda: Adapter.load(path),
    ):  # fmt: skip
        try:
            call()
        except UserError as error:
            assert str(error).strip()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("name", HOSTILE)
def test_a_small_file_takes_little_memory_and_is_refused(name, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(tensor_bytes(HOSTILE[name], {"ss_base_model_version": "sd_v1"}))
    assert path.stat().st_size < 500_000
    _, grown = in_child(lambda: everything(path), seconds=60)
    assert grown < MEMORY
    with pytest.raises(UserError, match="side of 0|makes a change of"):
        read_adapter_file(path)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(
    "tensors", [plain(1, 300_000, 1), loha(2, 20_000, 2), named(lokr_w1=(1, 1), lokr_w2_a=(1, N), lokr_w2_b=(N, 1))]
)
def test_a_rank_above_every_side_is_multiplied_out_and_never_paired(tensors, tmp_path):
    """The Gram matrices of rank 300,000 would take 720 GB, all pairs of 20,000 factors 3 GB."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(tensor_bytes(tensors, {"ss_base_model_version": "sd_v1"}))
    _, grown = in_child(lambda: everything(path), seconds=60)
    assert grown < MEMORY


def test_one_high_rank_does_not_blow_up_the_other_modules(tmp_path):
    """All modules get one rank: 700 of rank 1 beside one of 100,000 would be padded to gigabytes."""
    names = [module for module, sides in layer_sides("sd1").items() if module.startswith("unet.") and sides[1] < 3000]
    tensors = {}
    for module in names:
        out, read = layer_sides("sd1")[module]
        rank = 50_000 if module == LAYER else 1
        read = 1 if module == LAYER else read
        stem = "lora_unet_" + module.removeprefix("unet.").replace(".", "_")
        tensors |= {
            f"{stem}.lora_down.weight": torch.ones(rank, read),
            f"{stem}.lora_up.weight": torch.ones(out if rank == 1 else 1, rank),
        }
    path = tmp_path / "x.safetensors"
    path.write_bytes(tensor_bytes(tensors, {"ss_base_model_version": "sd_v1"}))
    with pytest.raises(UserError, match="has rank 1, another has 50000: one rank for all would take"):
        read_adapter_file(path)


def test_what_a_loha_of_high_rank_makes_is_its_product():
    torch.manual_seed(0)
    parts = {f"hada_w{n}_{x}": torch.randn(*((6, 4) if x == "a" else (4, 5))) for n in "12" for x in "ab"}
    a, b = lora_pair(LAYER, parts)
    wanted = (parts["hada_w1_a"] @ parts["hada_w1_b"]) * (parts["hada_w2_a"] @ parts["hada_w2_b"])
    assert len(a) == 5 and torch.allclose(b @ a, wanted, atol=1e-5)  # rank 16 would be three times as large


def test_the_norm_of_a_product_does_not_depend_on_the_way_it_is_computed():
    torch.manual_seed(0)
    for rank in (2, 40):
        a, b = torch.randn(rank, 7), torch.randn(9, rank)
        assert norm_of(a, b, 0.5) == pytest.approx(0.5 * float((b.double() @ a.double()).norm()), rel=1e-6)


def test_the_sides_are_those_of_the_released_models():
    assert sides_of(LAYER, "sd1") == (320, 320)
    assert sides_of("unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k", "sdxl") == (1280, 2048)
    assert sides_of("text_encoder.text_model.encoder.layers.3.mlp.fc1", "sd2") == (4096, 1024)
    assert sides_of("text_encoder_2.text_projection", "sdxl") == (1280, 1280)
    assert sides_of("unet.conv_in", "sd1") == (320, 108)  # models for inpainting read 9 channels
    assert sides_of(LAYER) == (320, 320) and sides_of("unet.unknown")[0] == 10240
