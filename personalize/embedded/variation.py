"""Changes to a sprite that make it look like art of another style: other hues, a slant, an outline.

A model that is trained on them too has less to change when it learns a subject in a style that it has never seen.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageChops, ImageFilter

MAX_HUE, MAX_SHEAR, MAX_OUTLINE = 0.5, 0.25, 0.05


@dataclass(frozen=True)
class Variation:
    """How a sprite is changed.

    hue: added to every pixel's hue, in turns of the colour circle, −0.5 to 0.5.
    shear: shift to the right of the upper edge against the lower one, as a fraction of the height, −0.25 to 0.25.
    outline: width of the border drawn around the sprite, as a fraction of its longest side, 0 to 0.05.
    outline_colour: RGB, each 0 to 255.

    Raises:
        ValueError: a number outside its range.
    """

    hue: float = 0.0
    shear: float = 0.0
    outline: float = 0.0
    outline_colour: tuple[int, int, int] = (0, 0, 0)

    def __post_init__(self) -> None:
        if abs(self.hue) > MAX_HUE or abs(self.shear) > MAX_SHEAR or not 0 <= self.outline <= MAX_OUTLINE:
            raise ValueError(
                f"a variation has hue within ±{MAX_HUE}, shear within ±{MAX_SHEAR} and outline from 0 to "
                f"{MAX_OUTLINE}, got {self}"
            )


def random_variation(rng: np.random.Generator) -> Variation:
    """A variation with a hue and a shear drawn evenly, and in two of three cases a black or white outline."""
    outlined = rng.random() < 2 / 3
    return Variation(
        hue=float(rng.uniform(-MAX_HUE, MAX_HUE)),
        shear=float(rng.uniform(-MAX_SHEAR, MAX_SHEAR)),
        outline=float(rng.uniform(0.02, MAX_OUTLINE)) if outlined else 0.0,
        outline_colour=(255, 255, 255) if rng.random() < 0.5 else (0, 0, 0),
    )


def vary(sprite: Image.Image, variation: Variation) -> Image.Image:
    """`sprite` (RGBA) changed as `variation` says: hue, then shear, then outline; the last two change its size."""
    if variation.hue:
        sprite = _shift_hue(sprite, variation.hue)
    if variation.shear:
        sprite = _shear(sprite, variation.shear)
    if variation.outline:
        sprite = _outline(sprite, max(1, round(variation.outline * max(sprite.size))), variation.outline_colour)
    return sprite


def _shift_hue(sprite: Image.Image, turns: float) -> Image.Image:
    hue, saturation, value = sprite.convert("RGB").convert("HSV").split()
    shifted = hue.point([round(level + 256 * turns) % 256 for level in range(256)])
    varied = Image.merge("HSV", (shifted, saturation, value)).convert("RGB")
    varied.putalpha(sprite.getchannel("A"))
    return varied


def _shear(sprite: Image.Image, shear: float) -> Image.Image:
    width, height = sprite.size
    extra = round(abs(shear) * height)
    offset = -extra if shear > 0 else 0.0
    # input x = output x + shear · y + offset, so that the upper edge comes out further to the right for shear > 0
    size, rows = (width + extra, height), (1.0, shear, offset, 0.0, 1.0, 0.0)
    premultiplied = sprite.convert("RGBa")  # else transparent pixels' colours leak into the edge
    sheared = premultiplied.transform(size, Image.Transform.AFFINE, rows, Image.Resampling.BILINEAR).convert("RGBA")
    return sheared.crop(sheared.getbbox())


def _outline(sprite: Image.Image, width: int, colour: tuple[int, int, int]) -> Image.Image:
    larger = Image.new("RGBA", (sprite.width + 2 * width, sprite.height + 2 * width))
    larger.paste(sprite, (width, width))
    alpha = larger.getchannel("A")
    border = Image.new("RGBA", larger.size, (*colour, 0))
    border.putalpha(ImageChops.lighter(alpha, alpha.filter(ImageFilter.MaxFilter(2 * width + 1))))
    return Image.alpha_composite(border, larger)
