"""Training data of the embedded model: scenes as pixels for the autoencoder, as captioned latents for the UNet."""

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

from personalize.embedded import scenes
from personalize.embedded.frames import Shape, middle_band, random_window, render_window, scene_in_window
from personalize.errors import UserError
from personalize.io.images import to_pixels
from personalize.randomness import generator
from personalize.training.pretraining.networks import tokenize

EXTRA_WORDS = "an and on the left right background photo of my".split()  # words that no phrase of `scenes` has


def vocabulary() -> list[str]:
    """Every word of every caption, for a tokenizer in which each is one token."""
    phrases = [
        *scenes.STYLES.values(),
        scenes.ANY_STYLE,
        *scenes.PLACES.values(),
        *map(scenes.noun_phrase, scenes.NOUNS),
    ]
    return sorted({word for phrase in phrases for word in phrase.split()} | {*scenes.COLOURS, *EXTRA_WORDS})


def check_styles(styles: Sequence[str]) -> None:
    """Raise UserError if the held-out style is among `styles`."""
    if scenes.HELD_OUT_STYLE in styles:
        raise UserError(
            f"style {scenes.HELD_OUT_STYLE!r} is held out of all training: "
            f"choose among {', '.join(scenes.TRAINING_STYLES)}"
        )


def check_shapes(shapes: Sequence[str]) -> None:
    """Raise UserError unless each of `shapes` is a width and height whose latents the UNet can halve three times."""
    for shape in shapes:
        sides = shape.split("x")
        if len(sides) != 2 or not all(side.isdecimal() and int(side) and int(side) % 32 == 0 for side in sides):
            raise UserError(f"expected a width and height in multiples of 32 px, such as 128x96, got {shape!r}")


def scene_pixels(scene: scenes.Scene, size: int) -> Tensor:
    """`scene` rendered as pixels (3, size, size) in [−1, 1]."""
    return to_pixels(Image.fromarray(scenes.render(scene, size)[0]))[0]


@dataclass(frozen=True)
class Crops:
    """Training pictures (3, side, side) of the autoencoder: whole scenes (two of five), and crops of larger ones.

    The larger scenes are rendered at twice the side.  Sample `i` depends on the seed and on i alone.
    """

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
        """`AutoencoderObjective`'s batch of the sample numbers `samples`: `pixels` and the posterior's `noise`."""
        shape = (4, self.side // 4, self.side // 4)
        noise = [torch.randn(shape, generator=generator(self.seed, "posterior", update, sample)) for sample in samples]
        return {"pixels": torch.stack([self[sample] for sample in samples]), "noise": torch.stack(noise)}


@dataclass(frozen=True)
class LatentPool:
    """Encoded scenes, from which training samples are drawn with replacement, each with one of its captions.

    latents: (N, 4, h, w), scaled by the VAE's scaling factor.
    masks: (N, 2, h, w) uint8, the share of each cell that the scene's first and second object cover, times 255.
    caption_dropout: share of samples whose caption is empty.
    """

    latents: Tensor
    masks: Tensor
    scene_list: tuple[scenes.Scene, ...]
    tokenizer: CLIPTokenizer
    seed: int
    caption_dropout: float

    def batch(self, update: int, samples: range) -> dict[str, Tensor]:
        """`TextToImageObjective`'s batch of the sample numbers `samples`; a sample depends on its number alone."""
        rows, texts, nouns = [], [], []
        for sample in samples:
            rng = generator(self.seed, "diffusion", 0, sample)
            index = int(torch.randint(len(self.latents), (1,), generator=rng))
            scene = self.scene_list[index]
            captions = scenes.captions(scene)
            choice = int(torch.randint(len(captions), (1,), generator=rng))
            dropped = bool(torch.rand((), generator=rng) < self.caption_dropout)
            texts.append("" if dropped else captions[choice])
            nouns.append(self.noun_positions(texts[-1], scene))
            clean, masks = self.latents[index].float(), self.masks[index].float() / 255
            rows.append((clean, masks, torch.randint(1000, (), generator=rng), torch.randn(clean.shape, generator=rng)))
        latents, masks, timesteps, noise = (torch.stack(column) for column in zip(*rows, strict=True))
        text = {"input_ids": tokenize(self.tokenizer, texts), "nouns": torch.tensor(nouns)}
        return {"latents": latents, "masks": masks, "timesteps": timesteps, "noise": noise, **text}

    def noun_positions(self, text: str, scene: scenes.Scene) -> list[int]:
        """Position among the tokens of `text` of the last token of each object's noun, for two objects.

        0 for an object that the text does not name, or that is not there.
        """
        ids, positions = self.tokenizer(text).input_ids, [0, 0]
        for number, thing in enumerate(scene.objects):
            noun = self.tokenizer(thing.noun.replace("_", " ")).input_ids[1:-1]
            ends = [end for end in range(len(noun), len(ids)) if ids[end - len(noun) + 1 : end + 1] == noun]
            positions[number] = next(iter(ends), 0)
        return positions


@dataclass(frozen=True)
class PoolsInTurn:
    """Pools of latents of different shapes: update u takes its whole batch from pool u mod n, a batch has one shape."""

    pools: tuple[LatentPool, ...]

    def batch(self, update: int, samples: range) -> dict[str, Tensor]:
        return self.pools[update % len(self.pools)].batch(update, samples)


class RenderedScenes(Dataset):
    """A data set of scenes in a frame (W, H): pixels (3, H, W), and masks (2, H/4, W/4) uint8 (share covered · 255).

    The frame is the middle band of a square scene; in a share of `windows` a random one of a larger scene.
    """

    def __init__(self, scene_list: Sequence[scenes.Scene], shape: Shape, windows: float = 0.0) -> None:
        self.scene_list, self.shape, self.windows = scene_list, shape, windows

    def __len__(self) -> int:
        return len(self.scene_list)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng([*self.shape, index])
        window = random_window(self.shape, rng) if rng.random() < self.windows else middle_band(self.shape)
        image, masks = render_window(scene_in_window(self.scene_list[index], window), window)
        shares = torch.zeros(2, self.shape[1] // 4, self.shape[0] // 4)
        for number, mask in enumerate(masks):
            shares[number] = avg_pool2d(torch.from_numpy(mask).float()[None], 4)[0]
        return to_pixels(Image.fromarray(image))[0], (255 * shares).round().byte()


@torch.inference_mode()
def encode_scenes(
    scene_list: Sequence[scenes.Scene],
    shape: Shape,
    vae: AutoencoderKL,
    *,
    windows: float = 0.0,
    workers: int = 0,
    batch: int = 32,
) -> tuple[Tensor, Tensor]:
    """The posterior's mean for N scenes in a frame (W, H), (N, 4, H/4, W/4) fp32 and not scaled, and their masks.

    windows: share of the scenes that are in a random window.  workers: processes that render in advance.
    """
    vae.eval()
    loader = DataLoader(RenderedScenes(scene_list, shape, windows), batch_size=batch, num_workers=workers)
    parts = [
        (vae.encode(pixels.to(vae.device), return_dict=False)[0].mean.float().cpu(), masks) for pixels, masks in loader
    ]
    latents, masks = (torch.cat(column) for column in zip(*parts, strict=True))
    return latents, masks
