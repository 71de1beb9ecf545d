"""Training of the package's scorer: labelled scenes, the degradations of generated pictures, objective and accuracy.

The scenes are of data splits of their own (`scorer-train`, `scorer-test`), none of which the benches' judge is trained
or tested on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import affine_grid, avg_pool2d, cross_entropy, grid_sample, interpolate

from personalize.embedded.scenes import BACKGROUNDS, NOUNS, STYLES, Scene, random_scene, render
from personalize.evaluation.scene_scorer import CELLS, SIDE, SceneProbabilities, SceneScorer, ScorerNet, resized
from personalize.randomness import generator
from personalize.training.losses import LossTerms

NOTHING = 0  # class of a cell without an object; noun n in style s has class 1 + 4 n + s
COVERED = 0.3  # an object that covers more than this share of a cell is the cell's class
RENDER_SIDE = 2 * SIDE  # px: scenes are rendered at twice the network's side and averaged down
PixelFunction = Callable[[Tensor], Tensor]


def scene_of(split: str, index: int) -> Scene:
    """Scene `index` of `split`, of any noun and style; every 20th has no object."""
    scene = random_scene(index, split=split, styles=tuple(STYLES))
    return replace(scene, objects=()) if index % 20 == 19 else scene


def rendered(split: str, indices: Sequence[int], change: PixelFunction | None = None) -> dict[str, Tensor]:
    """Rendered scenes as `pixels` (b, 3, 64, 64) uint8, with the classes of `cells` (b, 8, 8) and `background` (b,).

    change: applied to the pixels (b, 3, 128, 128) in [−1, 1] before they are averaged down.
    """
    rows = [labelled(scene_of(split, index)) for index in indices]
    pixels, cells, background = (torch.stack(column) for column in zip(*rows, strict=True))
    pixels = pixels.float() / 127.5 - 1
    small = resized(pixels if change is None else change(pixels))
    return {"pixels": ((small + 1) * 127.5).round().clamp(0, 255).byte(), "cells": cells, "background": background}


def labelled(scene: Scene) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels (3, 128, 128) uint8, the class of each cell (8, 8), and the background's index."""
    image, masks = render(scene, RENDER_SIDE)
    cells = torch.zeros(CELLS, CELLS, dtype=torch.int64)
    for thing, mask in zip(scene.objects, masks, strict=True):
        share = avg_pool2d(torch.from_numpy(mask)[None].float(), RENDER_SIDE // CELLS)[0]
        cells[share > COVERED] = 1 + NOUNS.index(thing.noun) * len(STYLES) + list(STYLES).index(thing.style)
    return torch.from_numpy(image).permute(2, 0, 1), cells, torch.tensor(BACKGROUNDS.index(scene.background))


@dataclass(frozen=True)
class ScorerData:
    """Labelled scenes in memory, as `rendered` gives them."""

    pixels: Tensor
    cells: Tensor
    background: Tensor
    seed: int

    def batch(self, update: int, samples: range) -> dict[str, Tensor]:
        """Randomly drawn, transformed and degraded scenes; the same ones for the same update and samples."""
        rng = generator(self.seed, "scorer", update, samples.start)
        rows = torch.randint(len(self.pixels), (len(samples),), generator=rng)
        pixels, cells = transformed(self.pixels[rows].float() / 127.5 - 1, self.cells[rows], rng)
        return {"pixels": degraded(pixels, rng), "cells": cells, "background": self.background[rows]}


def transformed(pixels: Tensor, cells: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pictures and their cells' classes shifted by up to 5 % and scaled by up to 10 %, half of them mirrored."""
    b = len(pixels)
    theta = torch.zeros(b, 2, 3)
    scale = 1 + 0.1 * _signed(rng, b)
    theta[:, 0, 0] = torch.where(torch.rand(b, generator=rng) < 0.5, -scale, scale)
    theta[:, 1, 1] = scale
    theta[:, :, 2] = 0.1 * _signed(rng, b, 2)
    grid = affine_grid(theta, list(pixels.shape), align_corners=False)
    pixels = grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    grid = affine_grid(theta, [b, 1, CELLS, CELLS], align_corners=False)
    classes = grid_sample(cells[:, None].float(), grid, mode="nearest", padding_mode="border", align_corners=False)
    return pixels, classes[:, 0].round().long()


def degraded(pixels: Tensor, rng: torch.Generator) -> Tensor:
    """Pictures (b, 3, 64, 64) in [−1, 1] with the defects of generated ones.

    Half of them are resampled at 0.35 to 1 of their resolution; all get a random gain and offset of each channel, white
    noise, and smooth low-resolution noise, as in pictures whose latents were not denoised completely.
    """
    b = len(pixels)
    out = pixels.clone()
    for rows in torch.randperm(b, generator=rng)[: b // 2].chunk(4):
        side = round(SIDE * (0.35 + 0.65 * float(torch.rand((), generator=rng))))
        small = interpolate(out[rows], (side, side), mode="bilinear", antialias=True, align_corners=False)
        out[rows] = interpolate(small, (SIDE, SIDE), mode="bicubic", align_corners=False)
    gain, offset = 1 + 0.12 * _signed(rng, b, 3, 1, 1), 0.12 * _signed(rng, b, 3, 1, 1)
    smooth = interpolate(torch.randn(b, 3, 12, 12, generator=rng), (SIDE, SIDE), mode="bicubic", align_corners=False)
    noise = 0.1 * torch.rand(b, 1, 1, 1, generator=rng) * torch.randn(out.shape, generator=rng)
    return (gain * out + offset + noise + 0.15 * torch.rand(b, 1, 1, 1, generator=rng) ** 2 * smooth).clamp(-1, 1)


def _signed(rng: torch.Generator, *shape: int) -> Tensor:
    """Random numbers, uniform in [−1, 1]."""
    return 2 * torch.rand(shape, generator=rng) - 1


class ScorerObjective(nn.Module):
    """The scorer's loss: cross-entropy of each cell's class and of the picture's background.

    L = mean over cells of CE(noun and style, or nothing) + ¼ CE(background)
    """

    def __init__(self, net: ScorerNet) -> None:
        super().__init__()
        self.net = net

    def forward(self, batch: dict[str, Tensor]) -> LossTerms:
        things, places, _, _ = self.net(batch["pixels"])
        logits = torch.cat([torch.zeros_like(things[:, :1]), things], 1)
        cells = cross_entropy(logits, batch["cells"])
        background = cross_entropy(places.mean((2, 3)), batch["background"])
        return LossTerms(cells + 0.25 * background, {"cells": cells.detach(), "background": background.detach()})


def accuracy(scorer: SceneScorer, split: str, count: int, change: PixelFunction | None = None) -> dict[str, float]:
    """Shares of scenes 0 … count − 1 of `split` on which nouns, background, style, and all three are right.

    Nouns are right if exactly the true ones have a probability above ½; background and style, if the most probable one
    is the true one.  change: applied to the pixels (1, 3, 128, 128) in [−1, 1] before the scorer sees them.
    """
    from PIL import Image

    right = []
    for index in range(count):
        scene = scene_of(split, index)
        pixels = torch.from_numpy(render(scene, RENDER_SIDE)[0])
        if change is not None:
            changed = change(pixels.permute(2, 0, 1)[None].float() / 127.5 - 1)
            pixels = ((changed[0].permute(1, 2, 0) + 1) * 127.5).round().clamp(0, 255).byte()
        right.append(_correct(scene, scorer.recognize([Image.fromarray(pixels.numpy())])[0]))
    table = np.array(right)
    shares = dict(zip(("nouns", "background", "style"), table.mean(0).round(4).tolist(), strict=True))
    return {"n": count, "all": round(float(table.all(1).mean()), 4), **shares}


def _correct(scene: Scene, seen: SceneProbabilities) -> tuple[bool, bool, bool]:
    """Whether nouns, background and style are right; a scene without objects has no style to be wrong about."""
    nouns = {noun for noun, probability in zip(NOUNS, seen.nouns.tolist(), strict=True) if probability > 0.5}
    styles = {thing.style for thing in scene.objects}
    return (
        nouns == {thing.noun for thing in scene.objects},
        BACKGROUNDS[int(seen.backgrounds.argmax())] == scene.background,
        not styles or list(STYLES)[int(seen.styles.argmax())] in styles,
    )
