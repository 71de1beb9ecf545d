"""Data augmentation of one picture: mirrored, shrunk onto a grey canvas, or zoomed in, with a matching prompt.

The canvas is the picture's bucket of H×W px (see `buckets`).  For its longer side R = max(H, W) a length s is drawn,
with probability ⅔ uniformly from [R/3, R], with ⅓ from [1.2 R, 1.4 R]; the picture is shown at s/R times the canvas.

    s < 0.6 R   26.6 %   "a far away", "very small"    the whole picture, anywhere on mid grey
    s > R       33.3 %   "zoomed in", "close up"       H×W px cut out of it
    otherwise   40.0 %   no prefix                     the whole picture at H×W px

References: Kumari et al., "Multi-Concept Customization of Text-to-Image Diffusion", arXiv 2212.04488, §4 and code.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from personalize.training.data.buckets import FittedImage, padded

FAR, NEAR = ("a far away ", "very small "), ("zoomed in ", "close up ")


@dataclass(frozen=True)
class View:
    """One way to show the picture: (h, w) px large, its corner at (`top`, `left`) of the canvas, mirrored if `flip`.

    size: of the picture without its bucket's padding.
    prefix: what the prompt has to begin with, e.g. "zoomed in ".
    """

    size: tuple[int, int]
    top: int = 0
    left: int = 0
    flip: bool = False
    prefix: str = ""

    def fills(self, canvas: tuple[int, int]) -> bool:
        """Is the `canvas` (H, W) full, but for the padding of its bucket?  If not, the picture lies on mid grey."""
        return any(own >= whole for own, whole in zip(self.size, canvas, strict=True))

    def time_ids(self, fitted: FittedImage) -> tuple[int, ...]:
        """SDXL's micro-conditioning of this view of a picture in its bucket, as `FittedImage.time_ids`.

        What a zoom cuts off above and at the left joins what the bucket cuts off, in pixels of the picture as shown.
        """
        corner, (whole, _) = fitted.mirrored_corner if self.flip else fitted.corner, fitted.unpadded_size
        top, left = (round(own * self.size[0] / whole) for own in corner)
        return replace(fitted, corner=(top + max(0, -self.top), left + max(0, -self.left))).time_ids


def draw_flip(rng: torch.Generator) -> bool:
    """Whether to mirror a picture, with probability ½."""
    return bool(torch.rand((), generator=rng) < 0.5)


def draw_view(fitted: FittedImage, rng: torch.Generator, *, augment: bool = True, random_flip: bool = True) -> View:
    """A random view of a picture in its bucket.

    augment: shrink or zoom in; random_flip: mirror every second one.
    """
    flip = draw_flip(rng) and random_flip
    size = fitted.unpadded_size
    if not augment:
        return View(size, flip=flip)
    side = max(fitted.size)
    near = bool(torch.rand((), generator=rng) < 1 / 3)
    length = _integer(round(1.2 * side), round(1.4 * side), rng) if near else _integer(side // 3, side + 1, rng)
    length += length % 2
    height, width = (max(1, round(length * own / side)) for own in size)
    room = (fitted.size[0] - height, fitted.size[1] - width)
    top, left = (_integer(0, (max(0, -free) if near else free) + 1, rng) for free in room)
    word = _integer(0, 2, rng)
    if near:
        return View((height, width), -top, -left, flip, NEAR[word])
    if length < 0.6 * side:
        return View((height, width), top, left, flip, FAR[word])
    return View(size, flip=flip)


def render_view(image: Image.Image, view: View, fitted: FittedImage) -> Tensor:
    """Draw `image` as `view` says on the canvas of its bucket, which is 0 where nothing is shown.

    fitted: the same picture in its bucket of H×W px, which says what part of it is shown.

    Returns (3, H, W) in [−1, 1], or for a grey `image` (mode L, a mask) (1, H, W) in [0, 1].
    """
    pixels, (height, width) = _resized(image, view, fitted), fitted.size
    if view.fills(fitted.size):
        pixels = padded(pixels, (max(height, view.size[0]), max(width, view.size[1])), mask=image.mode == "L")
        return pixels[:, -view.top : height - view.top, -view.left : width - view.left].contiguous()
    canvas = torch.zeros(len(pixels), height, width)
    canvas[:, view.top : view.top + view.size[0], view.left : view.left + view.size[1]] = pixels
    return canvas


def _resized(image: Image.Image, view: View, fitted: FittedImage) -> Tensor:
    """The part of `image` that its bucket shows, at the size of the view, (c, h, w)."""
    left, top, right, bottom = fitted.box or (0, 0, *image.size)
    if view.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        left, right = max(0, image.width - right), image.width - left
    how = Image.Resampling.BOX if image.mode == "L" else Image.Resampling.BICUBIC
    height, width = view.size
    array = np.asarray(image.resize((width, height), how, (left, top, right, bottom)), np.float32)
    return torch.from_numpy(array[..., None] / 255 if image.mode == "L" else array / 127.5 - 1).permute(2, 0, 1)


def canvas_mask(view: View, fitted: FittedImage, factor: int) -> Tensor:
    """Which latents count in the loss, (1, h, w) in {0, 1}: those that show the picture, and no padding.

    Where the picture lies on grey, the cells at its border do not count.
    """
    fills, parts = view.fills(fitted.size), zip((view.top, view.left), view.size, fitted.size, strict=True)
    rows, columns = (_counting(*part, factor, fills) for part in parts)
    mask = torch.zeros(1, *(side // factor for side in fitted.size))
    mask[:, rows, columns] = 1
    return mask


def _counting(low: int, length: int, side: int, factor: int, fills: bool) -> slice:
    """The cells along an axis of `side` px that show the picture, which takes `length` px from pixel `low` on.

    At least one, also where the picture is smaller than a cell.
    """
    high = min(low + length, side)
    first, last = (0, high // factor) if fills else (low // factor + 1, high // factor - 1)
    if first < last:
        return slice(first, last)
    middle = (low + high) // 2 // factor
    return slice(middle, middle + 1)


def reorder_phrases(prompt: str, phrases: Sequence[str], order: Sequence[int]) -> str:
    """`prompt` with its `phrases` in another `order`: phrase order[i] takes the place of phrase i.

    With order (1, 0), "<a> cat and <b> dog" becomes "<b> dog and <a> cat".  Every phrase must occur once, whatever its
    capitals, and keeps those that it has in the prompt.
    """
    patterns = [r"\s*".join(map(re.escape, phrase.split())) for phrase in phrases]
    found = [re.search(pattern, prompt, re.IGNORECASE) for pattern in patterns]
    places = [match.span() for match in found if match is not None]
    if len(places) < len(phrases):
        raise ValueError(f"the phrases {', '.join(phrases)} are not all in the prompt {prompt!r}")
    texts = [prompt[start:end] for start, end in places]
    for (start, end), other in sorted(zip(places, order, strict=True), reverse=True):  # from behind: places stay right
        prompt = prompt[:start] + texts[other] + prompt[end:]
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
