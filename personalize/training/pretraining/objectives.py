"""What the embedded model's autoencoder and diffusion are trained to minimise."""

# diffusers annotates less than it returns
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, l1_loss, mse_loss
from transformers import CLIPTextModel

from personalize.models.attention import hooked
from personalize.models.attention_maps import MapStore
from personalize.training.losses import LossTerms, debiased_weight, grounding

KL_WEIGHT = 1e-4


class AutoencoderObjective(nn.Module):
    """The autoencoder's loss: reconstruction, and a small KL penalty that keeps the posterior near N(0, 1).

        L = mean (x̂ − x)² + ¼ mean |x̂ − x| + w·KL(q ‖ N(0, 1)),   w = 1e-4, KL as a mean over the latents' elements

    References: Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", arXiv 2112.10752, §3.1.
    """

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, batch: dict[str, Tensor]) -> LossTerms:
        """The loss of a batch: `pixels` (b, 3, H, W) in [−1, 1], and standard normal `noise` (b, 4, H/4, W/4).

        The noise draws the latents from the posterior.
        """
        posterior = self.vae.encode(batch["pixels"]).latent_dist
        latents = posterior.mean + posterior.std * batch["noise"]
        decoded = self.vae.decode(latents).sample.float()
        squared, absolute = mse_loss(decoded, batch["pixels"]), l1_loss(decoded, batch["pixels"])
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        total = squared + 0.25 * absolute + KL_WEIGHT * kl
        return LossTerms(total, {"mse": squared.detach(), "l1": absolute.detach(), "kl": kl.detach()})


class TextToImageObjective(nn.Module):
    """The loss of the text encoder and the UNet: noise prediction on captioned latents, plus grounding.

        L = mean ‖ε − ε_θ(z_t, t, c(text))‖² / √SNR(t) + w·G

    With the weights 1/√SNR every timestep contributes about as much; with min-SNR-5 most of the loss comes from small
    t, where the objects' shapes are already decided.
    The grounding loss G keeps each noun's cross-attention in the decoder on its own object: without it two objects of
    one picture get parts of each other.  w is `grounding_weight`.

    References: Ho et al., arXiv 2006.11239, eq. 14; Yu et al., arXiv 2310.08442; Wang et al., arXiv 2312.03626.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        text_encoder: CLIPTextModel,
        scheduler: DDIMScheduler,
        grounding_weight: float = 0.0,
    ) -> None:
        super().__init__()
        self.unet, self.text_encoder, self.scheduler = unet, text_encoder, scheduler
        self.grounding_weight = grounding_weight

    def forward(self, batch: dict[str, Tensor]) -> LossTerms:
        """The loss of a batch: scaled `latents` and `noise` (b, 4, h, w), `timesteps` (b,), `input_ids` (b, 77).

        For grounding also the `masks` (b, k, h, w) in [0, 1] of k objects, and `nouns` (b, k), the position of each
        object's noun among the tokens; 0 for an object that is not there or not named.
        """
        noisy = self.scheduler.add_noise(batch["latents"], batch["noise"], batch["timesteps"])  # pyright: ignore
        embeds = self.text_encoder(batch["input_ids"]).last_hidden_state
        store = MapStore(cross=True, place="up", keep_graph=True)
        with hooked(self.unet, [store] if self.grounding_weight else []):
            predicted = self.unet(noisy, batch["timesteps"], embeds).sample.float()
        errors = (predicted - batch["noise"]).pow(2).mean((1, 2, 3))
        total = (debiased_weight(self.scheduler.alphas_cumprod, batch["timesteps"]) * errors).mean()
        parts = {"mse": errors.mean().detach()}
        if self.grounding_weight:
            parts["grounding"] = noun_grounding_loss(store, batch["masks"], batch["nouns"])
            total = total + self.grounding_weight * parts["grounding"]
        return LossTerms(total, {name: part.detach() for name, part in parts.items()})


def noun_grounding_loss(store: MapStore, masks: Tensor, nouns: Tensor) -> Tensor:
    """Mean grounding loss over the attention layers in `store` and the objects whose `nouns` (b, k) are not 0."""
    named, losses = nouns > 0, []
    for name, site in store.sites.items():
        maps = store.grid(name).mean(1).permute(0, 3, 1, 2)  # (b, l, h, w)
        noun_maps = maps.gather(1, nouns[..., None, None].expand(-1, -1, *maps.shape[-2:]))
        losses.append(grounding(noun_maps, adaptive_avg_pool2d(masks, (site.height, site.width))))
    return (torch.stack(losses).mean(0) * named).sum() / named.sum().clamp_min(1)
