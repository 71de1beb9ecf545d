"""Objectives: the module that owns every trainable of a method, and whose `forward` is its loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from personalize.lora import lora_layers, lora_parameters
from personalize.losses import LossTerms, min_snr_weight
from personalize.model import Conditioning, StableDiffusion


class SingleImage(nn.Module):
    """Overfit the adapter in `model.unet` and the source embedding e to one captioned picture:

        L = mean over samples of  w(t) ‖ y(z₀, ε, t) − f(z_t, t, e) ‖² / (c h w)          y = ε or v,  w = 1 or min-SNR

    e starts as the text encoder's output for the caption, bit for bit (SDXL: with its pooled vector), and is kept in
    fp32; with `standalone` it stays there, so that the caption alone recalls the picture.  Everything but the adapter
    and e is frozen.

    References: Zhang et al., "Forgedit", arXiv 2309.10556 (joint vision-language learning); min-SNR: Hang et al.,
    arXiv 2303.09556, eq. 7.
    """

    time_ids: Tensor | None

    def __init__(
        self, model: StableDiffusion, source: Conditioning, *, standalone: bool = False, snr_gamma: float | None = None
    ) -> None:
        """`source` is the caption's conditioning, one row; `model.unet` must carry a trainable adapter."""
        super().__init__()
        if len(source) != 1:
            raise ValueError(f"one picture has one source embedding, got {len(source)} rows: encode one caption")
        if not lora_layers(model.unet):
            raise ValueError("the UNet carries no adapter to train: call add_lora first")
        self.unet: nn.Module = model.unet
        self._model = (model,)  # in a tuple: a handle, not a part
        self.snr_gamma = snr_gamma
        self.embeds = nn.Parameter(source.embeds.detach().float().clone(), requires_grad=not standalone)  # (1, l, d)
        pooled = None if source.pooled is None else source.pooled.detach().float().clone()  # (1, e)
        self.pooled = None if pooled is None else nn.Parameter(pooled, requires_grad=not standalone)
        self.register_buffer("time_ids", None if source.time_ids is None else source.time_ids.clone())  # (1, 6)
        adapter = {id(parameter) for parameter in self.adapter_parameters()}
        for parameter in self.unet.parameters():
            parameter.requires_grad_(id(parameter) in adapter)

    def forward(self, batch: dict[str, Tensor]) -> LossTerms:
        """`latents` z₀ and `noise` ε (b, c, h, w), `timesteps` t (b,)."""
        model, latents, noise, timesteps = self._model[0], batch["latents"], batch["noise"], batch["timesteps"]
        noisy = model.noised(latents, noise, timesteps)
        output = model.predict(noisy, timesteps, self.source().repeat(len(latents)))
        errors = (output.float() - model.target(latents, noise, timesteps)).pow(2).mean((1, 2, 3))  # (b,)
        weights = torch.ones_like(errors)
        if self.snr_gamma is not None:
            weights = min_snr_weight(model.alphas_cumprod, timesteps, self.snr_gamma, model.prediction_type)
        return LossTerms((weights * errors).mean(), {"mse": errors.mean().detach()})

    def source(self) -> Conditioning:
        """The source embedding as it is now, one row."""
        return Conditioning(self.embeds, self.pooled, self.time_ids)

    def adapter_parameters(self) -> list[nn.Parameter]:
        """A and B of every LoRA layer, A before B, in the UNet's order."""
        return lora_parameters(self.unet)

    def groups(self, learning_rate: float, text_embedding_lr: float) -> list[dict]:
        """The optimiser's groups: the adapter at one rate, the source embedding (if it is trained) at the other."""
        groups = [{"params": self.adapter_parameters(), "lr": learning_rate}]
        text = [p for p in (self.embeds, self.pooled) if p is not None and p.requires_grad]
        return [*groups, {"params": text, "lr": text_embedding_lr}] if text else groups

    def trainable(self) -> dict[str, nn.Parameter]:
        """Every parameter that learns, by name: what a checkpoint must hold."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}
