"""The frozen base model: one class for Stable Diffusion 1.x, 2.x and XL, made of a diffusers pipeline's modules."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from personalize.models import parameterization
from personalize.models.conditioning import Conditioning
from personalize.models.config import EMBEDDED as EMBEDDED
from personalize.models.config import INPAINTING, base_name, check_channels
from personalize.models.identity import Hashed, hashed_unet
from personalize.models.idle_parts import Offload
from personalize.models.known_bases import portable_name, remember_base
from personalize.models.loading import default_device, default_dtype, family, load_pipeline, require_bf16, require_parts
from personalize.models.offloading import embedding_device, execution_device
from personalize.models.quantization import quantize
from personalize.models.supported import latent_size, require_supported, require_usable
from personalize.models.token_ids import equal_ids
from personalize.models.transfer import on_device, sent
from personalize.models.vae import accurate_vae, decoding_plan, require_finite, tiled_vae

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class StableDiffusion:
    """UNet, autoencoder, text encoders and noise schedule of one base model.

    Pictures are (b, 3, H, W) in [−1, 1].  Latents are (b, c, h, w) in fp32, always multiplied by the VAE's scaling
    factor.  `timesteps` are integers in [0, 1000).  The prediction type, ε or v, is handled here and nowhere else:

        z_t = √ᾱ x0 + √(1−ᾱ) ε        v = √ᾱ ε − √(1−ᾱ) x0

    References: Ho et al., arXiv 2006.11239, eq. 4; Salimans and Ho, arXiv 2202.00512, appendix D.
    """

    def __init__(self, pipe: DiffusionPipeline, name: str = "") -> None:
        from diffusers import DDIMScheduler

        parts = pipe.components
        require_parts((key for key, part in parts.items() if part is not None), name or type(pipe).__name__)
        parts = {key: getattr(part, "_orig_mod", part) for key, part in parts.items()}  # inside torch.compile's wrapper
        self.unet, self.vae, self.scheduler = parts["unet"], parts["vae"], parts["scheduler"]
        self.text_encoders = _present(parts, "text_encoder", "text_encoder_2")
        self.tokenizers = _present(parts, "tokenizer", "tokenizer_2")
        self.name = base_name(name or str(pipe.config.get("_name_or_path") or ""))
        self.family = family(self.unet, len(self.text_encoders))
        require_supported(self.scheduler, self.vae, self.name or "the base")
        self.prediction_type: str = self.scheduler.config.prediction_type
        self.parameterization = parameterization.of(self.prediction_type)
        self.zero_null = bool(pipe.config.get("force_zeros_for_empty_prompt", False))
        self.factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.resolution = latent_size(self.unet)[0] * self.factor
        schedule: Any = DDIMScheduler.from_config(self.scheduler.config)
        self._alphas_cumprod: Tensor = schedule.alphas_cumprod
        self._levels: list[float] = schedule.alphas_cumprod.tolist()
        self.masked_picture: Tensor | None = None  # what an inpainting UNet reads too, see `predict`
        self.offload = Offload()
        self._identity: dict[str, str] = {}  # from before `quantize`
        self._hashed: Hashed | None = None
        self.changes: tuple[tuple[Mapping[str, Mapping[str, Tensor]], float], ...] = ()  # applied now, not as LoRA
        self.final_alpha = float(schedule.final_alpha_cumprod)  # ᾱ of clean latents, below t = 0

    @staticmethod
    def load(
        source: str | Path | None = None, *, device: str | torch.device | None = None, dtype: torch.dtype | None = None,
        revision: str | None = None, variant: str | None = None, prediction_type: str | None = None,
        inpainting: bool = False, local_files_only: bool = False,
    ) -> StableDiffusion:  # fmt: skip
        """Load a diffusers folder or `.safetensors` checkpoint (both offline), a hub id, or (None) the embedded model.

        Args:
            dtype: of the UNet; by default fp32 on the CPU, bf16 on a GPU that supports it.  All other parts are fp32.
            prediction_type: overrides what the base says of itself; of single files that say nothing it is found out.
            inpainting: take inpainting models too, whose UNets read a mask and the masked picture; only drags use them.
            local_files_only: of the hub, take only what was downloaded before.

        All weights are frozen.  Raises UserError if there is no such base model.
        """
        device = torch.device(device or default_device())
        source, dtype = EMBEDDED if source is None else source, dtype or default_dtype(device)
        if dtype == torch.bfloat16:
            require_bf16(device)
        about: Any = {"revision": revision, "variant": variant, "prediction_type": prediction_type}
        pipe = load_pipeline(source, dtype, **about, inpainting=inpainting, local_files_only=local_files_only)
        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module):
                part.requires_grad_(False).eval().to(device)
        model = StableDiffusion(pipe, name=str(source))
        require_usable(model.unet, model.vae, model.name)
        check_channels(model.unet.config.in_channels, model.name, inpainting=inpainting)
        return model

    @staticmethod
    def from_pipeline(pipe: DiffusionPipeline, name: str = "") -> StableDiffusion:
        """The base model made of a stock pipeline's modules, which are shared with it and left as they are."""
        return StableDiffusion(pipe, name)

    def pipeline(self, cls: type | None = None, **parts: Any) -> Any:
        """A stock diffusers pipeline of these modules with a scheduler of its own; `parts` replace components."""
        from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

        cls = cls or (StableDiffusionXLPipeline if self.family == "sdxl" else StableDiffusionPipeline)
        components = {
            "unet": self.unet, "vae": self.vae, "scheduler": type(self.scheduler).from_config(self.scheduler.config),
            "text_encoder": self.text_encoders[0], "tokenizer": self.tokenizers[0], "safety_checker": None,
            "text_encoder_2": self.text_encoders[-1], "tokenizer_2": self.tokenizers[-1], "feature_extractor": None,
            "requires_safety_checker": False, "force_zeros_for_empty_prompt": self.zero_null, "add_watermarker": False,
        }  # fmt: skip
        accepted = inspect.signature(cls).parameters
        return cls(**{key: value for key, value in (components | parts).items() if key in accepted})

    def quantize(self) -> tuple[int, int]:
        """Turn the UNet's linear layers into 4-bit ones, for good; returns the UNet's bytes before and after."""
        self._identity = self.identity
        return quantize(self.unet)

    @property
    def device(self) -> torch.device:
        """Where the UNet computes; other parts may be elsewhere, and take and give tensors of this device."""
        return execution_device(self.unet.conv_in, self.unet)

    @property
    def alphas_cumprod(self) -> Tensor:
        """ᾱ of t = 0 … 999, on the model's device."""
        if self._alphas_cumprod.device != (device := self.device):
            self._alphas_cumprod = self._alphas_cumprod.to(device)
        return self._alphas_cumprod

    @alphas_cumprod.setter
    def alphas_cumprod(self, values: Tensor) -> None:
        self._alphas_cumprod, self._levels = values, values.tolist()

    @property
    def dtype(self) -> torch.dtype:
        """The UNet's precision; of one that stores 8 bits a weight and computes in more, that of its products."""
        stored = self.unet.conv_in.weight.dtype
        return stored if stored.itemsize > 1 else self.unet.dtype

    @property
    def inpainting(self) -> bool:
        """Whether the UNet reads a mask and the masked picture beside the latents."""
        return self.unet.config.in_channels == INPAINTING

    @property
    def identity(self) -> dict[str, str]:
        """Name, family and a quick hash of the UNet without adapters, see `unet_hash`; of 4 bits the one before."""
        if self._identity:
            return dict(self._identity)
        if self._hashed is None or not self.changes:
            self._hashed = hashed_unet(self.unet, self._hashed)
        return {"name": portable_name(self.name), "family": self.family, "sha256": self._hashed[1]}

    def about(self) -> dict[str, str]:
        """What adapters record of their base: its identity, its prediction type, and whether it was in 4 bits.

        Where it lies is kept on this machine alone, see `known_bases`.
        """
        remember_base(self.identity["sha256"], self.name)
        quantization = {"quantisation": "nf4"} if self._identity else {}
        return {**self.identity, "prediction_type": self.prediction_type, **quantization}

    # -- pictures and latents --------------------------------------------------------------------------------

    @torch.no_grad()
    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents of `pixels`, both (b, c, h, w) and both scaled."""
        with self.offload.using(self.vae), accurate_vae(self.vae):
            device = execution_device(self.vae.encoder.conv_in, self.vae)
            posterior = self.vae.encode(pixels.to(device, self.vae.encoder.conv_in.weight.dtype)).latent_dist
        scale, device = self.vae.config.scaling_factor, self.device
        return posterior.mean.to(device).float() * scale, posterior.std.to(device).float() * scale

    def encode(self, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Latents of `pixels`: the posterior's mean, or a sample of it if a (CPU) generator is given."""
        mean, std = self.posterior(pixels)
        if generator is None:
            return mean
        return mean + std * torch.randn(mean.shape, generator=generator).to(mean)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pixels of `latents`, clamped to [−1, 1]; where memory is short, row by row and in tiles.

        Raises:
            NonFiniteLatents: in place of a black picture, if the latents are none.
        """
        require_finite(latents)
        rows, tile = decoding_plan(self.vae, latents, self.device, tiled=self.offload.tiled)
        with self.offload.using(self.vae), accurate_vae(self.vae), tiled_vae(self.vae, tile):
            entry, scale = self.vae.decoder.conv_in, self.vae.config.scaling_factor
            device, dtype = execution_device(entry, self.vae), entry.weight.dtype
            scaled = (part.to(device, dtype) / scale for part in latents.split(rows))
            return torch.cat([self.vae.decode(part).sample.float().clamp(-1, 1) for part in scaled])

    # -- prompts ---------------------------------------------------------------------------------------------

    def prompts(self, texts: Sequence[str], size: tuple[int, int] | None = None) -> Conditioning:
        """Conditioning of `texts`, one row each, as the family's stock pipeline makes it, with gradients if enabled.

        Texts of over 75 tokens are encoded in chunks, see `token_ids`; l is k·77 for the k chunks of the longest.  The
        pooled embeddings are those of the first chunk.  `size` (H, W) in pixels goes into SDXL's time ids.
        """
        if isinstance(texts, str):
            raise ValueError(f"prompts takes a list of texts, got the single text {texts!r}: put it in a list")
        two, length = self.family == "sdxl", self.tokenizers[0].model_max_length
        device, ids = self.device, equal_ids(self.tokenizers, texts)
        with self.offload.using(*self.text_encoders):
            outputs = [
                encoder(sent(part.view(-1, length), embedding_device(encoder)), output_hidden_states=two)
                for encoder, part in zip(self.text_encoders, ids, strict=True)
            ]
        if not two:
            return Conditioning(_joined(outputs[0].last_hidden_state, len(texts)).to(device))
        embeds = torch.cat([_joined(output.hidden_states[-2], len(texts)).to(device) for output in outputs], -1)
        first_chunks = outputs[-1].text_embeds.to(device).unflatten(0, (len(texts), -1))[:, 0]
        return Conditioning(embeds, first_chunks, self.time_ids(len(texts), size).to(embeds))

    def padded(self, conditioning: Conditioning, length: int) -> Conditioning:
        """`conditioning` with chunks of the empty text behind it, up to `length` tokens; as it is if it has as many."""
        missing = (length - conditioning.embeds.shape[1]) // self.tokenizers[0].model_max_length
        if missing <= 0:
            return conditioning
        empty = self.prompts([""]).embeds.to(conditioning.embeds).repeat(len(conditioning), missing, 1)
        return replace(conditioning, embeds=torch.cat([conditioning.embeds, empty], 1))

    def null(self, count: int = 1, size: tuple[int, int] | None = None) -> Conditioning:
        """The conditioning of the null pass: that of the empty text, or zeros if an SDXL base is configured so."""
        empty = self.prompts([""] * count, size)
        if not self.zero_null or empty.pooled is None:
            return empty
        return Conditioning(torch.zeros_like(empty.embeds), torch.zeros_like(empty.pooled), empty.time_ids)

    def time_ids(self, count: int, size: tuple[int, int] | None = None) -> Tensor:
        """SDXL's micro-conditioning (count, 6): original size, crop corner (0, 0), target size, as (height, width)."""
        height, width = size or (self.resolution,) * 2
        return sent(torch.tensor([[height, width, 0, 0, height, width]] * count), self.device)

    def tokens(self, text: str) -> list[str]:
        """The tokens of `text` by the first tokenizer, with a "-" after those that do not end a word."""
        pieces, learned = self.tokenizers[0].tokenize(text, verbose=False), self.tokenizers[0].get_added_vocab()
        whole = [piece.endswith("</w>") or piece in learned for piece in pieces]
        return [piece.removesuffix("</w>") + "-" * (not ends) for piece, ends in zip(pieces, whole, strict=True)]

    # -- the diffusion ---------------------------------------------------------------------------------------

    def predict(self, latents: Tensor, timestep: Tensor | int | float, conditioning: Conditioning) -> Tensor:
        """The UNet's raw output (ε or v) in fp32, (b, c, h, w), for one timestep or one per row.

        An inpainting UNet also reads `masked_picture` (1, 1 + c, h, w): a mask, 1 where the picture is to be made, and
        the latents of the picture without that.  UserError if there is none.
        """
        cond = conditioning.to(self.device, self.dtype)
        extra = None if cond.pooled is None else {"text_embeds": cond.pooled, "time_ids": cond.time_ids}
        time, latents = on_device(timestep, cond.embeds.device), latents.to(cond.embeds.device, self.dtype)
        if self.masked_picture is not None:
            latents = torch.cat([latents, self.masked_picture.to(latents).expand(len(latents), -1, -1, -1)], 1)
        elif self.inpainting:
            check_channels(INPAINTING, self.name or "the base")  # refuses
        return self.unet(latents, time, cond.embeds, added_cond_kwargs=extra, return_dict=False)[0].float()

    def alpha(self, level: int) -> float:
        """ᾱ at timestep `level`; that of clean latents if `level` is negative."""
        return self._levels[level] if level >= 0 else self.final_alpha

    def noised(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """z_t = √ᾱ x0 + √(1−ᾱ) ε."""
        return parameterization.noised(latents, noise, self._alphas(timesteps, latents))

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What `predict` should return for z_t made of `latents` and `noise`: ε, or v = √ᾱ ε − √(1−ᾱ) x0."""
        return self.parameterization.target(latents, noise, self._alphas(timesteps, latents))

    def split(self, output: Tensor, z_t: Tensor, alpha_bar: Tensor | float) -> tuple[Tensor, Tensor]:
        """Estimates (x0, ε) from a raw output; `alpha_bar` is a number or broadcasts against (b, c, h, w)."""
        return self.parameterization.split(output, z_t, parameterization.as_alpha(alpha_bar, z_t))

    def joined(self, x0: Tensor, z_t: Tensor, alpha_bar: Tensor | float) -> Tensor:
        """The raw output whose clean estimate is `x0`: the inverse of `split` (ᾱ < 1)."""
        return self.parameterization.output(x0, z_t, parameterization.as_alpha(alpha_bar, z_t))

    def _alphas(self, timesteps: Tensor, like: Tensor) -> Tensor:
        """ᾱ of `timesteps`, (b, 1, 1, 1)."""
        return self.alphas_cumprod.to(like)[sent(timesteps, like.device)].view(-1, 1, 1, 1)


def _joined(states: Tensor, rows: int) -> Tensor:
    """The states (rows · k, 77, d) of k chunks for each of `rows` texts, one chunk after the other: (rows, k·77, d)."""
    return states.reshape(rows, -1, states.shape[-1])


def _present(parts: dict[str, Any], *names: str) -> tuple[Any, ...]:
    return tuple(parts[name] for name in names if parts.get(name) is not None)
