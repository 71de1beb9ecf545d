"""LoRA modules of a tiny UNet, filled and compared."""

import torch
from torch import Tensor, nn

from personalize.adapters import lora
from personalize.adapters.forgetting import RULES, selects
from personalize.models.stable_diffusion import StableDiffusion
from personalize.randomness import generator

ZEROED = {  # rule: modules it resets in the full and in the attention-only set of SD 1.x
    "noencoder": (70, 32),
    "nodecoder": (146, 72),
    "encoderattn": (38, 0),
    "encoderattn+encoder1": (22, 0),
    "encoderkv": (62, 24),
    "decoderattn": (74, 0),
    "decoderattn+decoder2": (49, 0),
    "decoderkv": (128, 54),
    "noencoderkv": (8, 8),
}


def chosen(unet: nn.Module, rule: str, targets: str = "full") -> set[str]:
    roles = lora.module_roles(unet, lora.module_names(unet, targets=targets))
    return {name for name, role in roles.items() if selects(RULES[rule], name, role)}


def filled(model: StableDiffusion, targets: str = "full", rank: int = 2, alpha: float = 3.0) -> StableDiffusion:
    """`model` with an adapter whose B is not zero."""
    lora.add_lora(model.unet, lora.module_names(model.unet, targets=targets), rank, alpha, seed=0)
    return fill(model)


def fill(model: StableDiffusion) -> StableDiffusion:
    with torch.no_grad():
        for number, layer in enumerate(lora.lora_layers(model.unet).values()):
            b = lora._pair(layer)[1]
            b.copy_(0.1 * torch.randn(b.shape, generator=generator(number, "fill")))
    return model


def answer(model: StableDiffusion) -> Tensor:
    rng = generator(0, "probe")
    latents, width = torch.randn(2, 4, 16, 16, generator=rng), model.unet.config.cross_attention_dim
    extra = {}
    if model.family == "sdxl":
        extra = {"text_embeds": torch.zeros(2, 40), "time_ids": torch.zeros(2, 6)}
    with torch.no_grad():
        text = torch.randn(2, 77, width, generator=rng)
        return model.unet(latents, torch.tensor([10, 700]), text, added_cond_kwargs=extra).sample


def modules(unet: nn.Module) -> dict[str, int]:
    return {name: id(module) for name, module in unet.named_modules()}
