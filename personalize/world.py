"""Training data of the embedded model: scenes as pixels for the autoencoder, as captioned latents for the diffusion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d
from torch.utils.data import DataLoader, Dataset
from transformers import CLIPTokenizer

from personalize import scenes
from personalize.errors import UserError
from personalize.images import to_pixels
from personalize.pretraining import tokenize
from personalize.randomness import generator

EXTRA_WORDS = "an and on the left right background photo of my".split()  # beside the phrases of `scenes`


def vocabulary() -> list[str]:
    """Every word of every caption, so that each is one token."""
    phrases = [
        *scenes.STYLES.values(),
        scenes.ANY_STYLE,
        *scenes.PLACES.values(),
        *map(scenes.noun_phrase, scenes.NOUNS),
    ]
    return sorted({word for phrase in phrases for word in phrase.split()} | {*scenes.COLOURS, *EXTRA_WORDS})


def check_styles(styles: Sequence[str]) -> None:
    """UserError if the held-out style is among `styles`."""
    if scenes.HELD_OUT_STYLE in styles:
        raise UserError(
            f"style {scenes.HELD_OUT_STYLE!r} is held out of all training: "
            f"choose among {', '.join(scenes.TRAINING_STYLES)}"
        )


def scene_pixels(scene: scenes.Scene, size: int) -> Tensor:
    """`scene` as pixels (3, size, size) in [−1, 1]."""
    return to_pixels(Image.fromarray(scenes.render(scene, size)[0]))[0]


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
            return scene_pixels(scene, self.side)
        left, top = rng.integers(0, self.side + 1, 2)
        return scene_pixels(scene, 2 * self.side)[:, top : top + self.side, left : left + self.side]

    def batch(self, update: int, samples: range) -> dict[str, Tensor]:
        """`pixels` of `samples`, and the unit noise of their posteriors' draws."""
        shape = (4, self.side // 4, self.side // 4)
        noise = [torch.randn(shape, generator=generator(self.seed, "posterior", update, sample)) for sample in samples]
        return {"pixels": torch.stack([self[sample] for sample in samples]), "noise": torch.stack(noise)}


@dataclass(frozen=True)
class LatentPool:
    """Encoded scenes with all their captions; samples are drawn from it with replacement.

    `latents` (N, 4, h, w) are scaled; `masks` (N, 2, h, w) hold the share of each cell that the scene's first and
    second thing cover, in 255ths.
    """

    latents: Tensor
    masks: Tensor
    world: tuple[scenes.Scene, ...]
    tokenizer: CLIPTokenizer
    seed: int
    caption_dropout: float

    def batch(self, update: int, samples: range) -> dict[str, Tensor]:
        """`latents`, `noise`, `timesteps`, `input_ids`, `masks` and the `nouns`' positions (b, 2) of `samples`."""
        rows, texts, nouns = [], [], []
        for sample in samples:
            rng = generator(self.seed, "diffusion", 0, sample)
            index = int(torch.randint(len(self.latents), (1,), generator=rng))
            captions = scenes.captions(self.world[index])
            choice = int(torch.randint(len(captions), (1,), generator=rng))
            dropped = bool(torch.rand((), generator=rng) < self.caption_dropout)
            texts.append("" if dropped else captions[choice])
            nouns.append(self.places(texts[-1], self.world[index]))
            clean, masks = self.latents[index].float(), self.masks[index].float() / 255
            rows.append((clean, masks, torch.randint(1000, (), generator=rng), torch.randn(clean.shape, generator=rng)))
        latents, masks, timesteps, noise = (torch.stack(column) for column in zip(*rows, strict=True))
        told = {"input_ids": tokenize(self.tokenizer, texts), "nouns": torch.tensor(nouns)}
        return {"latents": latents, "masks": masks, "timesteps": timesteps, "noise": noise, **told}

    def places(self, text: str, scene: scenes.Scene) -> list[int]:
        """Position among `text`'s tokens of the last one of each thing's noun; 0 for what is not there."""
        ids, found = self.tokenizer(text).input_ids, [0, 0]
        for number, thing in enumerate(scene.objects):
            word = self.tokenizer(thing.noun.replace("_", " ")).input_ids[1:-1]
            ends = [end for end in range(len(word), len(ids)) if ids[end - len(word) + 1 : end + 1] == word]
            found[number] = next(iter(ends), 0)
        return found


class RenderedScenes(Dataset):
    """Scenes as pixels and masks (2, side/4, side/4) uint8 in 255ths, for loader workers."""

    def __init__(self, world: Sequence[scenes.Scene], size: int) -> None:
        self.world, self.size = world, size

    def __len__(self) -> int:
        return len(self.world)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, masks = scenes.render(self.world[index], self.size)
        covers = torch.zeros(2, self.size // 4, self.size // 4)
        for number, mask in enumerate(masks):
            covers[number] = avg_pool2d(torch.from_numpy(mask).float()[None], 4)[0]
        return to_pixels(Image.fromarray(image))[0], (255 * covers).round().byte()


@torch.inference_mode()
def encode_scenes(
    world: Sequence[scenes.Scene], size: int, vae: AutoencoderKL, *, workers: int = 0, batch: int = 32
) -> tuple[Tensor, Tensor]:
    """Mean latents (N, 4, size/4, size/4) of `world`, unscaled, fp32, and masks; `workers` processes render ahead."""
    vae.eval()
    loader = DataLoader(RenderedScenes(world, size), batch_size=batch, num_workers=workers)
    parts = [
        (vae.encode(pixels.to(vae.device), return_dict=False)[0].mean.float().cpu(), masks) for pixels, masks in loader
    ]
    latents, masks = (torch.cat(column) for column in zip(*parts, strict=True))
    return latents, masks
