"""Objectives: the module that owns every trainable of a method, and whose `forward` is its loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from personalize.lora import lora_layers, lora_parameters
from personalize.losses import LossTerms, min_snr_weight
from personalize.model import Conditioning, StableDiffusion


class SingleImageObjective(nn.Module):
    """Overfit the adapter in `model.unet` and the source embeddings e to one captioned picture, or to a few:

        L = mean over samples of  w(t) Σ m (y(z₀, ε, t) − f(z_t, t, e))² / (c Σ m)  +  λ · the same of class pictures

        y = ε or v,   w = 1 or min-SNR,   m (1, h, w) = 1 or the weights of a mask

    There is a row e for each caption.  It starts as the text encoder's output, bit for bit (SDXL: with its pooled
    vector), and is kept in fp32; with `standalone` it stays there, so that the caption alone recalls the picture.  With
    `texts`, the captions are encoded anew for each batch instead, by text encoders that carry an adapter (DreamBooth).
    Everything but the adapters and e is frozen.

    References: Zhang et al., "Forgedit", arXiv 2309.10556 (joint vision-language learning); Ruiz et al., "DreamBooth",
    arXiv 2208.12242, eq. 2 (class pictures); min-SNR: Hang et al., arXiv 2303.09556, eq. 7.
    """

    time_ids: Tensor | None

    def __init__(
        self,
        model: StableDiffusion,
        source: Conditioning,
        *,
        standalone: bool = False,
        snr_gamma: float | None = None,
        prior: Conditioning | None = None,
        prior_loss_weight: float = 1.0,
        texts: Sequence[str] = (),
        size: tuple[int, int] | None = None,
    ) -> None:
        """`source` is the captions' conditioning, `prior` that of the class pictures' captions, a row each.

        texts: all these captions in this order, if the text encoders learn; `size` (H, W) goes with them.
        `model.unet` must carry a trainable adapter.
        """
        super().__init__()
        if not lora_layers(model.unet):
            raise ValueError("the UNet carries no adapter to train: call add_lora first")
        self.unet: nn.Module = model.unet
        self.text_encoders = nn.ModuleList(model.text_encoders if texts else ())
        self._model = (model,)  # in a tuple: a handle, not a part
        self._prior = () if prior is None else (prior,)
        self.snr_gamma, self.prior_loss_weight = snr_gamma, prior_loss_weight
        self.texts, self.size = tuple(texts), size
        learns = not standalone and not texts
        self.embeds = nn.Parameter(source.embeds.detach().float().clone(), requires_grad=learns)  # (p, l, d)
        pooled = None if source.pooled is None else source.pooled.detach().float().clone()  # (p, e)
        self.pooled = None if pooled is None else nn.Parameter(pooled, requires_grad=learns)
        self.register_buffer("time_ids", None if source.time_ids is None else source.time_ids.clone())  # (p, 6)
        adapter = {id(parameter) for parameter in (*self.adapter_parameters(), *self.text_parameters())}
        for part in (self.unet, *self.text_encoders):
            for parameter in part.parameters():
                parameter.requires_grad_(id(parameter) in adapter)

    def forward(self, batch: dict[str, Tensor]) -> LossTerms:
        """`latents` z₀ and `noise` ε (b, c, h, w), `timesteps` t (b,), `rows` of the captions (b,).

        `weights` m (b, 1, h, w) may be absent.  With `prior`, the second half of the batch are class pictures.
        """
        errors, weights = self.errors(batch)
        own = len(errors) // 2 if self._prior else len(errors)
        parts = {"mse": errors[:own].mean().detach()}
        total = (weights * errors)[:own].mean()
        if self._prior:
            total = total + self.prior_loss_weight * (weights * errors)[own:].mean()
            parts["prior"] = errors[own:].mean().detach()
        return LossTerms(total, parts)

    def errors(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The mean squared error of each sample, and what it counts, both (b,)."""
        model, latents, noise, timesteps = self._model[0], batch["latents"], batch["noise"], batch["timesteps"]
        noisy = model.noised(latents, noise, timesteps)
        output = model.predict(noisy, timesteps, self.told(batch["rows"]))
        squares = (output.float() - model.target(latents, noise, timesteps)).pow(2)
        counts = batch.get("weights", torch.ones_like(squares[:, :1]))
        errors = (counts * squares).sum((1, 2, 3)) / (counts.sum((1, 2, 3)) * squares.shape[1])  # (b,)
        weights = torch.ones_like(errors)
        if self.snr_gamma is not None:
            weights = min_snr_weight(model.alphas_cumprod, timesteps, self.snr_gamma, model.prediction_type)
        return errors, weights

    def told(self, rows: Tensor) -> Conditioning:
        """What the UNet is told of samples with captions `rows` (b,)."""
        if self.texts:
            used, place = rows.unique(return_inverse=True)
            return self._model[0].prompts([self.texts[row] for row in used.tolist()], self.size)[place]
        return Conditioning.cat([self._learned(), *self._prior])[rows]

    def source(self) -> Conditioning:
        """The embedding of the first caption as it is now, one row."""
        if self.texts:
            with torch.no_grad():
                return self._model[0].prompts(self.texts[:1], self.size)
        return self._learned()[:1]

    def _learned(self) -> Conditioning:
        return Conditioning(self.embeds, self.pooled, self.time_ids)

    def adapter_parameters(self) -> list[nn.Parameter]:
        """A and B of every LoRA layer in the UNet, A before B, in its own order."""
        return lora_parameters(self.unet)

    def text_parameters(self) -> list[nn.Parameter]:
        """A and B of every LoRA layer in the text encoders."""
        return [parameter for encoder in self.text_encoders for parameter in lora_parameters(encoder)]

    def groups(self, learning_rate: float, text_embedding_lr: float, text_encoder_lr: float = 0.0) -> list[dict]:
        """The optimiser's groups: the adapter; then the source embeddings, or the text encoders, if they learn."""
        groups = [{"params": self.adapter_parameters(), "lr": learning_rate}]
        text = [p for p in (self.embeds, self.pooled) if p is not None and p.requires_grad]
        groups += [{"params": text, "lr": text_embedding_lr}] if text else []
        encoders = self.text_parameters()
        return [*groups, {"params": encoders, "lr": text_encoder_lr}] if encoders else groups

    def trainable(self) -> dict[str, nn.Parameter]:
        """Every parameter that learns, by name: what a checkpoint must hold."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}
