"""The objective of single-image training: the loss, and the module that owns every trained parameter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from personalize.adapters.lora import lora_layers, lora_parameters
from personalize.adapters.textual_inversion import TokenEmbedding
from personalize.models.conditioning import of_one_length
from personalize.models.stable_diffusion import Conditioning, StableDiffusion
from personalize.models.transfer import sent
from personalize.training.losses import LossTerms, Objective, masked_mse, min_snr_weight


class SingleImageObjective(Objective):
    """Overfit the adapter in `model.unet` and the source embedding e to one captioned picture, or to a few:

        L = mean over samples of  w(t) Σ m (y(z₀, ε, t) − f(z_t, t, e))² / (c Σ m)  +  λ · the same of class pictures

        y = ε or v,   w = 1 or min-SNR,   m (1, h, w) = 1 or the weights of a mask

    The source embedding has one row (l, d) for each caption.  A row starts as the text encoder's output, bit for bit
    (SDXL: with its pooled vector), and is kept in fp32.  With `standalone` it is not trained, so that the caption alone
    recalls the picture.  With `texts` there is no source embedding: text encoders that carry an adapter (DreamBooth) or
    learned tokens (textual inversion) encode the captions again for each batch.  All else is frozen.

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
        null: Conditioning | None = None,
        rows: Sequence[TokenEmbedding] = (),
    ) -> None:
        """Freeze the base and start the source embedding; `model.unet` must carry a trainable adapter.

        Args:
            source: conditioning of the captions, p rows.
            prior: conditioning of the class pictures' captions, a row each, which may be of another length.
            null: conditioning of the empty prompt, one row, for samples that are `dropped`.
            texts: all these captions in this order, if something in the text encoders is trained; `size` (H, W) goes
                with them.
            rows: the text encoders' layers that hold learned tokens, whose embeddings are trained.
        """
        super().__init__()
        if not lora_layers(model.unet):
            raise ValueError("the UNet carries no adapter to train: call add_lora first")
        self.unet: nn.Module = model.unet
        self.rows = nn.ParameterList(layer.weight for layer in rows)
        self.text_encoders = nn.ModuleList(model.text_encoders if texts else ())
        self._model = (model,)  # in a tuple, so that torch does not count it among this module's parts
        self._prior = () if prior is None else (prior,)
        self._null = null
        self.snr_gamma, self.prior_loss_weight = snr_gamma, prior_loss_weight
        self.texts, self.size = tuple(texts), size
        trained = not standalone and not texts
        self.embeds = nn.Parameter(source.embeds.detach().float().clone(), requires_grad=trained)  # (p, l, d)
        pooled = None if source.pooled is None else source.pooled.detach().float().clone()  # (p, e)
        self.pooled = None if pooled is None else nn.Parameter(pooled, requires_grad=trained)
        self.register_buffer("time_ids", None if source.time_ids is None else source.time_ids.clone())  # (p, 6)
        learned = {id(p) for p in (*lora_parameters(self.unet), *self.text_parameters(), *self.rows)}
        for part in (self.unet, *self.text_encoders):
            for parameter in part.parameters():
                parameter.requires_grad_(id(parameter) in learned)

    def forward(self, batch: dict[str, Tensor]) -> LossTerms:
        """The loss of a batch: `latents` z₀ and `noise` ε (b, c, h, w), `timesteps` t and caption `rows` (b,).

        `weights` m (b, 1, h, w), the `share` (b,) of each sample, see `Chunk`, and whether it is `dropped` (b,), that
        is, learned with the empty prompt instead of its caption, may be absent.  With `prior`, the second half of the
        batch are class pictures.
        """
        errors, weights = self.sample_errors(batch)
        errors = errors * batch["share"] if "share" in batch else errors
        own = len(errors) // 2 if self._prior else len(errors)
        parts = {"mse": errors[:own].mean().detach()}
        total = (weights * errors)[:own].mean()
        if self._prior:
            total = total + self.prior_loss_weight * (weights * errors)[own:].mean()
            parts["prior"] = errors[own:].mean().detach()
        return LossTerms(total, parts)

    def sample_errors(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The mean squared error of each sample, and its weight w(t), both (b,)."""
        model, latents, noise, timesteps = self._model[0], batch["latents"], batch["noise"], batch["timesteps"]
        noisy, target = model.noised(latents, noise, timesteps), model.target(latents, noise, timesteps)
        conditioning = self.conditioning(batch["rows"])
        if "dropped" in batch:
            conditioning = self._without_captions(conditioning, batch["dropped"])
        if "time_ids" in batch:
            conditioning = replace(conditioning, time_ids=batch["time_ids"].to(conditioning.embeds))
        output = model.predict(noisy, timesteps, conditioning)
        errors = masked_mse(output, target, batch.get("weights", torch.ones_like(target[:, :1])))
        weights = torch.ones_like(errors)
        if self.snr_gamma is not None:
            weights = min_snr_weight(model.alphas_cumprod, timesteps, self.snr_gamma, model.prediction_type)
        return errors, weights

    def conditioning(self, rows: Tensor) -> Conditioning:
        """The UNet's conditioning for samples with the captions `rows` (b,).

        Captions of the subject and of class pictures that differ in length are repeated, see `of_one_length`: neither
        changes what the others mean.
        """
        if self.texts:
            used, place = rows.unique(return_inverse=True)
            every = Conditioning.cat(of_one_length(self._encoded(used.tolist())))
            return every[sent(place, every.embeds.device)]
        every = Conditioning.cat(of_one_length([self.source_embeddings(), *self._prior]))
        return every[sent(rows, self.embeds.device)]

    def _encoded(self, rows: list[int]) -> list[Conditioning]:
        """The captions `rows`, in rising order, by the text encoders as they are now; as long in every batch.

        One part, or two if class pictures' captions have another length than the subject's.
        """
        own, length = sum(row < len(self.embeds) for row in rows), self.embeds.shape[1]
        prior = self._prior[0].embeds.shape[1] if self._prior else length
        parts = [(rows, length)] if prior == length else [(rows[:own], length), (rows[own:], prior)]
        model, texts = self._model[0], [([self.texts[row] for row in part], most) for part, most in parts if part]
        return [model.padded(model.prompts(some, self.size), most) for some, most in texts]

    def _without_captions(self, conditioning: Conditioning, dropped: Tensor) -> Conditioning:
        """`conditioning` with that of the empty prompt in the rows that are `dropped` (b,)."""
        null = self._model[0].null(1, self.size) if self.texts else self._null  # encoders that learn change it
        assert null is not None, "samples are dropped with a null conditioning alone"
        conditioning, null = of_one_length([conditioning, null])
        embeds = torch.where(dropped[:, None, None], null.embeds.to(conditioning.embeds), conditioning.embeds)
        if conditioning.pooled is None or null.pooled is None:
            return replace(conditioning, embeds=embeds)
        pooled = torch.where(dropped[:, None], null.pooled.to(conditioning.pooled), conditioning.pooled)
        return replace(conditioning, embeds=embeds, pooled=pooled)

    def source(self) -> Conditioning:
        """The embeddings of the subject's captions as they are now, a row for each."""
        if self.texts:
            with torch.no_grad():
                own = self._model[0].prompts(self.texts[: len(self.embeds)], self.size)
                return self._model[0].padded(own, self.embeds.shape[1])
        return self.source_embeddings()

    def source_embeddings(self) -> Conditioning:
        """The source embedding as it is now, a row for each caption."""
        return Conditioning(self.embeds, self.pooled, self.time_ids)

    def adapter_parameters(self) -> list[nn.Parameter]:
        """A and B of every LoRA layer in the UNet, A before B, in the UNet's own order."""
        return lora_parameters(self.unet)

    def text_parameters(self) -> list[nn.Parameter]:
        """A and B of every LoRA layer in the text encoders."""
        return [parameter for encoder in self.text_encoders for parameter in lora_parameters(encoder)]

    def groups(self, learning_rate: float, text_embedding_lr: float, text_encoder_lr: float = 0.0) -> list[dict]:
        """The optimizer's groups: the adapter; source embedding or learned tokens; the text encoders; as trained."""
        groups = [{"params": self.adapter_parameters(), "lr": learning_rate}]
        text = [p for p in (self.embeds, self.pooled, *self.rows) if p is not None and p.requires_grad]
        groups += [{"params": text, "lr": text_embedding_lr}] if text else []
        encoders = self.text_parameters()
        return [*groups, {"params": encoders, "lr": text_encoder_lr}] if encoders else groups
