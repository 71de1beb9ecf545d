"""Single-image fine-tuning as in the Forgedit paper: full weights instead of a LoRA, in fp32, and a source embedding.

    with full_weights_applied(model, learned, rules("decoderattn")): ...      # part of what was learned is forgotten

Trained are all parameters of the encoder below full resolution and of the decoder blocks with attention: on SD 1.x
`down_blocks.1`–`3` and `up_blocks.1`–`3`, 68 % of the UNet.

References: Zhang et al., "Forgedit", arXiv 2309.10556.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from personalize.adapters.forgetting import ForgettingRule, degrees
from personalize.models.blocks import block_roles, module_roles
from personalize.models.stable_diffusion import Conditioning, StableDiffusion
from personalize.randomness import generator
from personalize.training.loop import training_steps
from personalize.training.losses import LossTerms

EMBEDDING_RATE = 1e-3  # learning rate of the source embedding


@dataclass(frozen=True)
class FullWeights:
    """The result of `learn_full`: weights by parameter name, and the source embedding in an adapter's form."""

    weights: dict[str, Tensor]
    source: dict[str, Tensor]


class FullObjective(nn.Module):
    """The loss  L = mean ‖ε − f(z_t, t, e)‖²  of the UNet's trained parameters and the source embedding e."""

    def __init__(self, model: StableDiffusion, source: Conditioning) -> None:
        super().__init__()
        self.unet, self._model = model.unet, (model,)
        self.embeds = nn.Parameter(source.embeds.clone())
        self.pooled = None if source.pooled is None else nn.Parameter(source.pooled.clone())
        self._time_ids = source.time_ids

    def forward(self, batch: dict[str, Tensor]) -> LossTerms:
        model, source = self._model[0], Conditioning(self.embeds, self.pooled, self._time_ids)
        noisy = model.noised(batch["latents"], batch["noise"], batch["timesteps"])
        output = model.predict(noisy, batch["timesteps"], source.repeat(len(noisy)))
        target = model.target(batch["latents"], batch["noise"], batch["timesteps"])
        return LossTerms((output.float() - target).pow(2).mean(), {})


def trained_names(unet: nn.Module) -> list[str]:
    """The names of the parameters that the paper trains."""
    blocks = tuple(
        f"{name}." for name, role in block_roles(unet).items()
        if (role.side == "encoder" and role.level > 0) or (role.side == "decoder" and role.attention)
    )  # fmt: skip
    return [name for name, _ in unet.named_parameters() if name.startswith(blocks)]


def learn_full(
    model: StableDiffusion, pixels: Tensor, caption: str, rate: float, *, samples: int = 400, batch: int = 10
) -> FullWeights:
    """Train on the picture `pixels` (1, 3, H, W) and its `caption`, and restore the model's weights.

    The latents are one sample of the posterior.  Adam makes `samples` // `batch` updates at learning rate `rate` (1e-3
    for the embedding), without loss weights and without gradient clipping.
    """
    with torch.no_grad():
        prompt = model.prompts([caption], (pixels.shape[-2], pixels.shape[-1]))
    latents = model.encode(pixels, generator(0, "full/posterior"))
    names = set(trained_names(model.unet))
    chosen = {name: parameter for name, parameter in model.unet.named_parameters() if name in names}
    before = {name: parameter.detach().clone() for name, parameter in chosen.items()}
    objective = FullObjective(model, prompt)
    embeddings = [part for part in (objective.embeds, objective.pooled) if part is not None]
    try:
        for parameter in chosen.values():
            parameter.requires_grad_(True)
        groups = [{"params": list(chosen.values()), "lr": rate}, {"params": embeddings, "lr": EMBEDDING_RATE}]
        accelerator = Accelerator(cpu=model.device.type == "cpu")
        prepared, optimizer = accelerator.prepare(objective, torch.optim.Adam(groups))
        updates = ([_batch(model, latents, update, batch)] for update in range(samples // batch))
        for _ in training_steps(prepared, updates, optimizer, accelerator=accelerator):
            pass
        learned = {name: parameter.detach().clone() for name, parameter in chosen.items()}
    finally:
        for name, parameter in chosen.items():
            parameter.requires_grad_(False).grad = None
            parameter.data.copy_(before[name])
    source = {"embeds": objective.embeds.detach()}
    if objective.pooled is not None:
        source["pooled"] = objective.pooled.detach()
    return FullWeights(learned, source)


def _batch(model: StableDiffusion, latents: Tensor, update: int, size: int) -> dict[str, Tensor]:
    rng = generator(0, "full/noise", update)
    timesteps = torch.randint(len(model.alphas_cumprod), (size,), generator=rng)
    noise = torch.randn((size, *latents.shape[1:]), generator=rng)
    device = latents.device
    return {"latents": latents.expand(size, -1, -1, -1), "noise": noise.to(device), "timesteps": timesteps.to(device)}


@contextmanager
def full_weights_applied(
    model: StableDiffusion, learned: FullWeights, forgotten: Sequence[ForgettingRule] = ()
) -> Iterator[None]:
    """Run the body with the learned weights in the UNet, and restore the base's weights.

    Where a forgetting rule of degree d selects, θ = d θ_learned + (1 − d) θ_base.
    """
    parameters: dict[str, Any] = dict(model.unet.named_parameters())
    before = {name: parameters[name].detach().clone() for name in learned.weights}
    modules = dict.fromkeys(name.rpartition(".")[0] for name in learned.weights)
    kept = degrees(module_roles(model.unet, modules), forgotten)
    try:
        with torch.no_grad():
            for name, weight in learned.weights.items():
                parameters[name].lerp_(weight, kept[name.rpartition(".")[0]])
        yield
    finally:
        for name, weight in before.items():
            parameters[name].data.copy_(weight)
