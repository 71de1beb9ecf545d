"""Data augmentation of one square picture: mirrored, shrunk onto a grey canvas, or zoomed in, with a matching prompt.

For a canvas of R px a size s is drawn, with probability ⅔ uniformly from [R/3, R], with ⅓ from [1.2 R, 1.4 R).

    s < 0.6 R   26.6 %   "a far away", "very small"    the picture at s×s px, anywhere on mid grey
    s > R       33.3 %   "zoomed in", "close up"       R×R px cut out of the picture at s×s px
    otherwise   40.0 %   no prefix                     the picture at R×R px

References: Kumari et al., "Multi-Concept Customization of Text-to-Image Diffusion", arXiv 2212.04488, §4 and code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

FAR, NEAR = ("a far away ", "very small "), ("zoomed in ", "close up ")


@dataclass(frozen=True)
class View:
    """One way to show the picture: at `size` px, mirrored if `flip`, its corner at (`top`, `left`) of the canvas.

    prefix: what the prompt has to begin with, e.g. "zoomed in ".
    """

    size: int
    top: int = 0
    left: int = 0
    flip: bool = False
    prefix: str = ""


def draw_view(side: int, rng: torch.Generator, *, augment: bool = True) -> View:
    """A random view for a canvas of `side` px; without `augment` the picture is mirrored or not, and nothing else."""
    flip = bool(torch.rand((), generator=rng) < 0.5)
    if not augment:
        return View(side, flip=flip)
    near = bool(torch.rand((), generator=rng) < 1 / 3)
    size = _integer(round(1.2 * side), round(1.4 * side), rng) if near else _integer(side // 3, side + 1, rng)
    size += size % 2
    top, left = (_integer(0, abs(side - size) + 1, rng) for _ in range(2))
    word = _integer(0, 2, rng)
    if size > side:
        return View(size, -top, -left, flip, NEAR[word])
    if size < 0.6 * side:
        return View(size, top, left, flip, FAR[word])
    return View(side, flip=flip)


def render_view(image: Image.Image, view: View, side: int) -> Tensor:
    """Draw the square `image` as `view` says on a canvas of R = `side` px, which is 0 where nothing is shown.

    Returns (3, R, R) in [−1, 1], or for a grey `image` (mode L, a mask) (1, R, R) in [0, 1].
    """
    if view.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    how = Image.Resampling.BOX if image.mode == "L" else Image.Resampling.BICUBIC
    array = np.asarray(image.resize((view.size, view.size), how), np.float32)
    pixels = torch.from_numpy(array[..., None] / 255 if image.mode == "L" else array / 127.5 - 1).permute(2, 0, 1)
    canvas = torch.zeros(len(pixels), side, side)
    if view.size > side:
        return pixels[:, -view.top : side - view.top, -view.left : side - view.left].contiguous()
    canvas[:, view.top : view.top + view.size, view.left : view.left + view.size] = pixels
    return canvas


def canvas_mask(view: View, side: int, factor: int) -> Tensor:
    """Which latents count in the loss, (1, h, w) in {0, 1}: all, or for a shrunk picture those inside its square.

    The cells at the square's border do not count.
    """
    cells = side // factor
    mask = torch.ones(1, cells, cells)
    if view.size < side:
        rows, columns = (slice(at // factor + 1, (at + view.size) // factor - 1) for at in (view.top, view.left))
        mask = torch.zeros(1, cells, cells)
        mask[:, rows, columns] = 1
    return mask


def crop_square(image: Image.Image) -> Image.Image:
    """The largest square from the middle of `image`."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def reorder_phrases(prompt: str, phrases: Sequence[str], order: Sequence[int]) -> str:
    """`prompt` with its `phrases` in another `order`: phrase order[i] takes the place of phrase i.

    With order (1, 0), "<a> cat and <b> dog" becomes "<b> dog and <a> cat".  Every phrase must occur once.
    """
    for index, phrase in enumerate(phrases):
        prompt = prompt.replace(phrase, f"\0{index}\0", 1)
    for index, other in enumerate(order):
        prompt = prompt.replace(f"\0{index}\0", phrases[other])
    return prompt


def draw_order(count: int, probability: float, rng: torch.Generator) -> list[int]:
    """A random order of `count` subjects: with `probability` another than the written one (0, 1, …), if `count` > 1."""
    order = list(range(count))
    if count < 2 or torch.rand((), generator=rng) >= probability:
        return order
    while (drawn := torch.randperm(count, generator=rng).tolist()) == order:
        pass
    return drawn


def _integer(low: int, high: int, rng: torch.Generator) -> int:
    """Uniform in [low, high)."""
    return int(torch.randint(low, high, (), generator=rng))
