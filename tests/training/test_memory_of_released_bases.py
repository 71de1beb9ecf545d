"""What training takes on cards that people have: the shapes of SD 1.5 and SDXL, on the device that holds no numbers."""

from __future__ import annotations

import json
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from personalize.models.empty import CONFIGS
from personalize.models.gradient_checkpointing import gradient_checkpointing
from personalize.models.memory import LiveBytes, decoding_bytes, encoding_bytes
from personalize.models.quantization import saved_by_quantizing, weight_bytes
from personalize.models.vae import TILE
from personalize.training.memory_estimate import MemoryEstimate, adam_8bit_bytes

GB = 10**9
CONTEXT = GB  # of CUDA, its work spaces and fragmentation, which the estimate leaves out
ENCODERS = {"sd15": 0.49 * GB, "sdxl": 3.27 * GB}  # 123 and 818 million weights, which stay in fp32


def released(name: str) -> tuple[Any, Any]:
    """UNet (bf16, with LoRA of rank 16 in its attention) and autoencoder, without numbers."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from peft import LoraConfig

    unet, vae = (json.loads((CONFIGS / name / part / "config.json").read_text()) for part in ("unet", "vae"))
    model: Any = UNet2DConditionModel.from_config(unet)
    model.to(torch.bfloat16).requires_grad_(False)
    model.add_adapter(LoraConfig(r=16, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    for parameter in model.parameters():
        parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
    return model, AutoencoderKL.from_config(vae)


def needed(name: str, side: int, *, checkpointing: bool, four_bits: bool) -> MemoryEstimate:
    """The estimate of one sample of `side` px in a batch, with `--offload`, and 8-bit AdamW beside a base in 4 bits."""
    with torch.device("meta"):
        unet, vae = released(name)
        trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
        latents, text = torch.empty(1, 4, side // 8, side // 8), torch.empty(1, 77, unet.config.cross_attention_dim)
        more = {"text_embeds": torch.empty(1, 1280).bfloat16(), "time_ids": torch.empty(1, 6)}
        given = {"added_cond_kwargs": more if name == "sdxl" else None, "return_dict": False}
        less = gradient_checkpointing(unet) if checkpointing else nullcontext()
        with less, LiveBytes([*unet.parameters()]) as live:
            time = torch.empty((), dtype=torch.long)
            output = unet(latents.bfloat16(), time, text.bfloat16(), **given)[0]
            torch.autograd.grad(output.float().square().mean(), trained, allow_unused=True)
    adapter = sum(map(weight_bytes_of, trained))
    base = weight_bytes(unet) - adapter - (saved_by_quantizing(unet) if four_bits else 0)
    moments = sum(adam_8bit_bytes(p.numel()) for p in trained) if four_bits else 2 * adapter
    encoders = round(ENCODERS[name])
    return MemoryEstimate(
        base, adapter, adapter, moments, live.peak, 1, weight_bytes(vae), encoders,
        encoding_bytes(vae, (side, side)), decoding_bytes(vae, (TILE, TILE)),
    )  # fmt: skip


def weight_bytes_of(parameter: torch.Tensor) -> int:
    return parameter.numel() * parameter.element_size()


@pytest.mark.slow  # forward and backward passes through all shapes of SDXL
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name, side, card", [("sd15", 512, 6 * GB), ("sdxl", 1024, 12 * GB)])
def test_released_bases_fit_on_common_cards(name: str, side: int, card: int) -> None:
    """Of SD 1.5 6.8 GB come to 3.6 with checkpointing and 3.2 in 4 bits; of SDXL 26.9 to 8.7 and 5.5."""
    room = card - CONTEXT
    whole = needed(name, side, checkpointing=False, four_bits=False)
    checkpointed = needed(name, side, checkpointing=True, four_bits=False)
    least = needed(name, side, checkpointing=True, four_bits=True)
    assert whole.total > room, "checkpointing would not be needed"
    for saving in (checkpointed, least):
        assert saving.total < room, str(saving)
    assert least.updates < checkpointed.updates < whole.updates
