"""The objective of multi-concept training: cross-attention keys and values and new tokens, with calibrated attention.

    L = mean over samples of  w ‖ m ⊙ (y − f(z_t, t, e)) ‖² / (c Σ m)  +  λ · mean over instance samples of L_attn

w is 1 for samples of the picture and `prior_loss_weight` for regularisation samples; m (b, 1, h, w) is 1 where the
canvas shows the picture; L_attn is `binding` and `separation` of the losses module on the tokens' attention maps.

λ is relative to this mean squared error.  The released code has 0.01, but its loss is a sum over the four latent
channels, four times ours: 0.0025 is equivalent.  The paper has 1.

References: Zhang et al., "Attention Calibration for Disentangled Text-to-Image Personalization", arXiv 2403.18551;
Kumari et al., "Multi-Concept Customization of Text-to-Image Diffusion", arXiv 2212.04488 (λ = 0).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from personalize.adapters.lora import lora_layers, lora_parameters
from personalize.adapters.textual_inversion import TokenEmbedding
from personalize.errors import UserError
from personalize.models.attention import AttentionHook, AttentionSite, attention_sites, hooked
from personalize.models.attention_maps import CalibrationMaps, calibration_layers
from personalize.models.conditioning import Conditioning
from personalize.models.stable_diffusion import StableDiffusion
from personalize.models.transfer import sent
from personalize.training.config import CALIBRATION_WEIGHT
from personalize.training.losses import LossTerms, Objective, anchoring, calibration, masked_mse

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel


def text_projections(unet: UNet2DConditionModel) -> list[str]:
    """Paths of the key and value projections of every cross-attention layer: 32 modules on SD 1.x."""
    crossing = [name for name, site in attention_sites(unet).items() if site.cross]
    return [f"{name}.{part}" for name in crossing for part in ("to_k", "to_v")]


class DetachedStart(AttentionHook):
    """Give keys and values of start tokens, one in `chunk` text positions, no gradient: most attention goes to them."""

    def __init__(self, chunk: int = 77) -> None:
        self.chunk = chunk

    def wants(self, site: AttentionSite) -> bool:
        return site.cross

    def qkv(self, q: Tensor, k: Tensor, v: Tensor, site: AttentionSite) -> tuple[Tensor, Tensor, Tensor]:
        starts = (torch.arange(k.shape[2], device=k.device) % self.chunk == 0)[:, None]
        return q, torch.where(starts, k.detach(), k), torch.where(starts, v.detach(), v)


class MultiConceptObjective(Objective):
    """The loss at the head of this module; trains the adapter (or the projections' full weights) and the token rows.

    Make it inside `textual_inversion.installed_tokens(…, trainable=True)`.  Everything else of the base is frozen.
    """

    def __init__(
        self,
        model: StableDiffusion,
        rows: Sequence[TokenEmbedding],
        *,
        calibration_weight: float = CALIBRATION_WEIGHT,
        prior_loss_weight: float = 1.0,
        mask_weight: float = 0.0,
        full_kv: bool = False,
    ) -> None:
        super().__init__()
        self.unet: nn.Module = model.unet
        self.rows = nn.ParameterList(layer.weight for layer in rows)
        self._model = (model,)  # in a tuple, so that torch does not count it among this module's parts
        self.calibration_weight, self.prior_loss_weight = calibration_weight, prior_loss_weight
        self.mask_weight, self.full_kv = mask_weight, full_kv
        if not full_kv and not lora_layers(model.unet):
            raise ValueError("the UNet carries no adapter to train: call add_lora first")
        trained = {id(parameter) for parameter in (*self.adapter_parameters(), *self.rows)}
        for part in (model.unet, *model.text_encoders):
            for parameter in part.parameters():
                parameter.requires_grad_(id(parameter) in trained)

    def forward(self, batch: dict[str, Any]) -> LossTerms:
        """The loss of a batch: `latents` z₀ and `noise` ε (b, c, h, w) at `timesteps` (b,), with prompts `texts` (b).

        canvas: (b, 1, h, w), 1 where the latents count.
        instance: (b,) bool, False for regularisation samples; on the CPU, or else it is read from the device.
        nouns, modifiers: (b, s, l), 1 at the text positions of each concept's class phrase and of its token; 0 if the
            prompt does not contain it.
        text_lengths: the positions to which texts of instance samples and of others are padded; both are then repeated
            up to l, so that neither changes what the other means.  If absent, all are padded to l.
        masks: (b, s, H, W) in [0, 1], where each concept is; may be absent.
        share: (b,), how much a sample counts in the mean over this batch, see `Chunk`; 1 if absent.
        instance_share: (b,), how much an instance sample counts in the sum over this batch of the attention losses; if
            absent, the mean over its instance samples is taken.
        time_ids: (b, 6), SDXL's size conditioning of each sample; absent for other bases.
        """
        model, latents, noise, timesteps = self._model[0], batch["latents"], batch["noise"], batch["timesteps"]
        noisy, target = model.noised(latents, noise, timesteps), model.target(latents, noise, timesteps)
        store = self._map_store(latents)
        hooks = [DetachedStart(model.tokenizers[0].model_max_length), *([] if store is None else [store])]
        conditioning = self._conditioning(batch)
        if "time_ids" in batch:
            conditioning = replace(conditioning, time_ids=batch["time_ids"].to(conditioning.embeds))
        with hooked(model.unet, hooks):
            output = model.predict(noisy, timesteps, conditioning)
        errors = masked_mse(output, target, batch["canvas"])  # (b,)
        instance, chosen = batch["instance"].cpu(), sent(batch["instance"], errors.device)
        weights = torch.where(chosen, 1.0, self.prior_loss_weight).to(errors)
        share = batch.get("share", torch.ones_like(errors))
        instance_share = batch.get("instance_share", chosen / chosen.sum().clamp(min=1)).to(errors)
        parts = {"mse": (instance_share * errors).sum().detach()}
        total = (share * weights * errors).mean()
        if store is not None:  # the same names in all processes, also in one that shows a class picture
            parts |= {name: torch.zeros_like(total) for name in self._attention_names(batch)}
        if store is not None and bool(instance.any()):
            with torch.autocast(latents.device.type, enabled=False):  # scaling maps magnifies rounding
                rows = sent(instance.nonzero().flatten(), errors.device)
                attention, attention_parts = self._attention_loss(store, batch, rows, instance_share[rows])
            total, parts = total + attention, parts | attention_parts
        return LossTerms(total, parts)

    def _conditioning(self, batch: Mapping[str, Any]) -> Conditioning:
        """The conditioning of the texts, with l positions each."""
        model, texts, length = self._model[0], batch["texts"], batch["nouns"].shape[-1]
        own, prior = batch.get("text_lengths", (length, length))
        if own == prior:
            return model.padded(model.prompts(texts), length)
        kinds, parts, order = batch["instance"].tolist(), list[Conditioning](), list[int]()
        for kind, most in ((True, own), (False, prior)):
            if rows := [row for row, instance in enumerate(kinds) if instance == kind]:
                part = model.padded(model.prompts([texts[row] for row in rows]), most)
                parts.append(replace(part, embeds=part.embeds.repeat(1, length // most, 1)))
                order += rows
        places = sorted(range(len(order)), key=order.__getitem__)
        return Conditioning.cat(parts)[torch.tensor(places, device=parts[0].embeds.device)]

    def _map_store(self, latents: Tensor) -> CalibrationMaps | None:
        """A recorder of attention maps; None if no loss reads them, so that all attention stays fused."""
        if not self.calibration_weight and not self.mask_weight:
            return None
        height, width = latents.shape[-2:]
        return CalibrationMaps(calibration_layers(self._model[0].unet, (height, width)))

    def _attention_names(self, batch: Mapping[str, Any]) -> list[str]:
        """The names of the attention losses."""
        return ["calibration", *(["anchoring"] if self.mask_weight and "masks" in batch else [])]

    def _attention_loss(
        self, store: CalibrationMaps, batch: Mapping[str, Any], rows: Tensor, share: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The attention losses of the samples `rows`, summed with the weights `share`."""
        nouns = store.of_tokens(batch["nouns"])[rows]
        modifiers = store.of_tokens(batch["modifiers"])[rows]
        store.maps.clear()  # otherwise the maps that gradient checkpointing recomputes would stay in memory
        calibrated = (share * torch.stack([calibration(c, m) for c, m in zip(nouns, modifiers, strict=True)])).sum()
        total, parts = self.calibration_weight * calibrated, {"calibration": calibrated.detach()}
        if self.mask_weight and "masks" in batch:
            height, width = nouns.shape[-2:]
            masks = adaptive_avg_pool2d(batch["masks"][rows].float(), (height, width))
            pairs = zip([*nouns, *modifiers], [*masks, *masks], strict=True)
            anchored = (share.repeat(2) * torch.stack([anchoring(maps, mask).sum() for maps, mask in pairs])).sum()
            total, parts = total + self.mask_weight * anchored, parts | {"anchoring": anchored.detach()}
        return total, parts

    def adapter_parameters(self) -> list[nn.Parameter]:
        """A and B of every LoRA layer, A before B; with `full_kv` the projections' own weights."""
        if not self.full_kv:
            return lora_parameters(self.unet)
        unet: Any = self.unet
        return [unet.get_submodule(name).weight for name in text_projections(unet)]

    def groups(self, learning_rate: float, token_learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
        """The optimizer's groups: the adapter, and the token rows, which never decay."""
        return [
            {"params": self.adapter_parameters(), "lr": learning_rate, "weight_decay": weight_decay},
            {"params": list(self.rows), "lr": token_learning_rate, "weight_decay": 0.0},
        ]


@contextmanager
def full_weights(unet: Any) -> Iterator[dict[str, Tensor]]:
    """Yield copies of the projections' weights; the body may train the weights, which are restored afterwards.

    Raises:
        UserError: the UNet is not in fp32, in which small updates would be lost.
    """
    layers = {name: unet.get_submodule(name) for name in text_projections(unet)}
    if any(layer.weight.dtype != torch.float32 for layer in layers.values()):
        raise UserError("full_kv trains the base's own weights, which must be fp32: use --mixed_precision no or fp16")
    weights_before = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    try:
        yield weights_before
    finally:
        with torch.no_grad():
            for name, layer in layers.items():
                layer.weight.copy_(weights_before[name])
                layer.weight.grad = None
