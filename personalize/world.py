"""Training data of the embedded model: scenes as pixels for the autoencoder, as captioned latents for the diffusion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import CLIPTokenizer

from personalize import scenes
from personalize.errors import UserError
from personalize.pretraining import tokenize
from personalize.randomness import generator

MORE_WORDS = "an and on the left right background photo of my".split()  # beside the phrases of `scenes`


def vocabulary() -> list[str]:
    """Every word of every caption, so that each is one token."""
    phrases = [
        *scenes.STYLES.values(),
        scenes.ANY_STYLE,
        *scenes.PLACES.values(),
        *map(scenes.noun_phrase, scenes.NOUNS),
    ]
    return sorted({word for phrase in phrases for word in phrase.split()} | {*scenes.COLOURS, *MORE_WORDS})


def check_styles(styles: Sequence[str]) -> None:
    """UserError if the held-out style is among `styles`."""
    if scenes.HELD_OUT_STYLE in styles:
        raise UserError(
            f"style {scenes.HELD_OUT_STYLE!r} is held out of all training: "
            f"choose among {', '.join(scenes.TRAINING_STYLES)}"
        )


def pixels_of(scene: scenes.Scene, size: int) -> Tensor:
    """`scene` as pixels (3, size, size) in [−1, 1]."""
    return torch.from_numpy(scenes.render(scene, size)[0].astype(np.float32) / 127.5 - 1).permute(2, 0, 1)


@dataclass(frozen=True)
class Crops:
    """Pictures (3, side, side) for the autoencoder: whole scenes, and (three of five) crops of twice as large ones."""

    side: int
    seed: int
    styles: tuple[str, ...] = scenes.TRAINING_STYLES

    def __getitem__(self, sample: int) -> Tensor:
        rng = np.random.default_rng([self.seed, sample])
        scene = scenes.random_scene(sample, styles=self.styles)
        if rng.random() < 0.4:
            return pixels_of(scene, self.side)
        left, top = rng.integers(0, self.side + 1, 2)
        return pixels_of(scene, 2 * self.side)[:, top : top + self.side, left : left + self.side]

    def batch(self, update: int, samples: range) -> dict[str, Tensor]:
        """`pixels` of `samples`, and the unit noise of their posteriors' draws."""
        shape = (4, self.side // 4, self.side // 4)
        noise = [torch.randn(shape, generator=generator(self.seed, "posterior", update, sample)) for sample in samples]
        return {"pixels": torch.stack([self[sample] for sample in samples]), "noise": torch.stack(noise)}


@dataclass(frozen=True)
class LatentPool:
    """Scaled latents (N, 4, h, w) of N scenes with all their captions; samples are drawn from it with replacement."""

    latents: Tensor
    captions: tuple[tuple[str, ...], ...]
    tokenizer: CLIPTokenizer
    seed: int
    caption_dropout: float

    def batch(self, update: int, samples: range) -> dict[str, Tensor]:
        """`latents`, `noise`, `timesteps` and `input_ids` of `samples`."""
        rows, texts = [], []
        for sample in samples:
            rng = generator(self.seed, "diffusion", 0, sample)
            index = int(torch.randint(len(self.latents), (1,), generator=rng))
            choice = int(torch.randint(len(self.captions[index]), (1,), generator=rng))
            dropped = bool(torch.rand((), generator=rng) < self.caption_dropout)
            texts.append("" if dropped else self.captions[index][choice])
            clean = self.latents[index].float()
            rows.append((clean, torch.randint(1000, (), generator=rng), torch.randn(clean.shape, generator=rng)))
        latents, timesteps, noise = (torch.stack(column) for column in zip(*rows, strict=True))
        return {
            "latents": latents,
            "timesteps": timesteps,
            "noise": noise,
            "input_ids": tokenize(self.tokenizer, texts),
        }


class Rendered(Dataset):
    """Scenes as pixels, for loader workers."""

    def __init__(self, world: Sequence[scenes.Scene], size: int) -> None:
        self.world, self.size = world, size

    def __len__(self) -> int:
        return len(self.world)

    def __getitem__(self, index: int) -> Tensor:
        return pixels_of(self.world[index], self.size)


@torch.inference_mode()
def encoded(
    world: Sequence[scenes.Scene], size: int, vae: AutoencoderKL, *, workers: int = 0, batch: int = 32
) -> Tensor:
    """Mean latents (N, 4, size/4, size/4) of `world`, unscaled, fp32; `workers` processes render ahead."""
    vae.eval()
    loader = DataLoader(Rendered(world, size), batch_size=batch, num_workers=workers)
    posteriors = (vae.encode(pixels.to(vae.device), return_dict=False)[0] for pixels in loader)
    return torch.cat([posterior.mean.float().cpu() for posterior in posteriors])
