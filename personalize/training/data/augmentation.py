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


def draw_view(side: int, rng: torch.Generator, *, augment: bool = True, random_flip: bool = True) -> View:
    """A random view for a canvas of `side` px.

    augment: shrink or zoom in; random_flip: mirror every second one.
    """
    flip = bool(torch.rand((), generator=rng) < 0.5) and random_flip
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


def canvas_mask(view: View, side: int, factor: int, shown: tuple[float, float] = (1.0, 1.0)) -> Tensor:
    """Which latents count in the loss, (1, h, w) in {0, 1}: those that show the picture.

    Where the picture ends within the canvas, the cells at its border do not count.

    shown: the part of the square's height and width that the picture takes, in its middle; see `pad_square`.
    """
    cells = side // factor
    mask = torch.zeros(1, cells, cells)
    parts = zip((view.top, view.left), shown, strict=True)
    rows, columns = (_counting(at, view.size, part, side, factor) for at, part in parts)
    mask[:, rows, columns] = 1
    return mask


def _counting(at: int, size: int, part: float, side: int, factor: int) -> slice:
    """The cells along one axis that show the middle `part` of a square of `size` px, which begins at pixel `at`."""
    if size >= side and part == 1:
        return slice(None)
    margin = size * (1 - part) / 2
    low, high = at + margin, at + size - margin
    ends = size < side  # then also a picture that touches the canvas's border ends there
    first = int(low // factor) + 1 if low > 0 or ends else 0
    last = int(high // factor) - 1 if high < side or ends else side // factor
    return slice(first, last)


def pad_square(image: Image.Image) -> tuple[Image.Image, tuple[float, float]]:
    """The whole `image` in the middle of a square, and the parts of the square's height and width that it takes.

    The rest is mid grey, as the canvas is, and in a mask (mode L) black.
    """
    side = max(image.size)
    square = Image.new(image.mode, (side, side), 0 if image.mode == "L" else (128, 128, 128))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square, (image.height / side, image.width / side)


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
