"""Scenes: the embedded model's world, openly licensed emoji art at chosen positions on chosen backgrounds.

A `Scene` is a frozen value.  It renders deterministically, with an exact mask for each object and true captions.  The
true result of an edit is another scene, which can be rendered too:

    before = random_scene(7)
    after = before.with_background("beach")          # what the edit "… on the beach" should give

Coordinates are fractions of the frame (x to the right, y down), so that a scene can be rendered at any size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from zlib import crc32

import numpy as np
from PIL import Image, ImageFilter

from personalize.embedded.backgrounds import COLOURS, paint_background
from personalize.embedded.variation import Variation, random_variation, vary

SPRITES = Path(__file__).parent / "sprites"

STYLES = {
    "3d": "a render of",
    "drawing": "a drawing of",
    "modern": "an icon of",
    "flat": "a sticker of",
}
ANY_STYLE = "a picture of"
HELD_OUT_STYLE = "flat"  # the autoencoder, the text encoder and the UNet were not trained on it
TRAINING_STYLES = tuple(style for style in STYLES if style != HELD_OUT_STYLE)

NOUNS = tuple(
    "airplane apple balloon banana basketball bear bed bus butterfly cactus cake camera car cat chair chicken clock "
    "coffee_cup cookie cow crab crown dog dolphin donut drum fish fox frog gift_box glasses grapes guitar hamburger "
    "hamster horse house key koala lemon light_bulb lion monkey mushroom octopus orange_fruit owl palm_tree panda "
    "penguin pig pine_tree pineapple pizza pumpkin rabbit rocket rose snail snowman soccer_ball strawberry sunflower "
    "teapot teddy_bear tent tiger top_hat turtle umbrella watermelon whale wolf".split()
)
_PLURALS = {"glasses", "grapes"}

PLACES = {
    "beach": "on the beach",
    "grass": "on the grass",
    "night": "in the night sky",
    "snow": "in the snow",
    "desert": "in the desert",
    "wood": "on a wooden table",
    "water": "in the water",
    "bricks": "by a brick wall",
}
BACKGROUNDS = (*COLOURS, *PLACES)


@dataclass(frozen=True)
class SceneObject:
    """One object of a scene: the sprite of `noun` in `style`, with its centre at (`x`, `y`).

    size: its longest side, as a fraction of the frame.
    angle: degrees, counter-clockwise.
    flip: mirrored left to right.
    variation: how the sprite is changed first; None: not at all.

    Raises:
        ValueError: there is no such style, or no sprite of the noun in it.
    """

    noun: str
    style: str
    x: float = 0.5
    y: float = 0.5
    size: float = 0.6
    angle: float = 0.0
    flip: bool = False
    variation: Variation | None = None

    def __post_init__(self) -> None:
        if self.style not in STYLES:
            raise ValueError(f"unknown style {self.style!r}: choose one of {', '.join(STYLES)}")
        if not sprite_path(self.noun, self.style).is_file():
            raise ValueError(f"no sprite of a {self.noun!r} in style {self.style!r}; nouns: {', '.join(NOUNS)}")


@dataclass(frozen=True)
class Scene:
    """A background and the objects before it; later objects cover earlier ones.

    Raises:
        ValueError: there is no such background.
    """

    background: str
    objects: tuple[SceneObject, ...]

    def __post_init__(self) -> None:
        if self.background not in BACKGROUNDS:
            raise ValueError(f"unknown background {self.background!r}: choose one of {', '.join(BACKGROUNDS)}")

    @property
    def words(self) -> list[str]:
        """The objects' nouns as captions write them: `coffee_cup` → "coffee cup"."""
        return [thing.noun.replace("_", " ") for thing in self.objects]

    def with_background(self, background: str) -> Scene:
        """This scene on another background."""
        return replace(self, background=background)

    def with_object(self, index: int, **changes: object) -> Scene:
        """This scene with fields of object `index` replaced, e.g. `with_object(0, noun="dog")`."""
        objects = list(self.objects)
        objects[index] = replace(objects[index], **changes)  # type: ignore[arg-type]
        return replace(self, objects=tuple(objects))

    def with_style(self, style: str) -> Scene:
        """This scene with all objects in another style."""
        return replace(self, objects=tuple(replace(thing, style=style) for thing in self.objects))

    def with_object_shifted(self, index: int, dx: float, dy: float) -> Scene:
        """This scene with object `index` shifted by (`dx`, `dy`), in fractions of the frame."""
        thing = self.objects[index]
        return self.with_object(index, x=thing.x + dx, y=thing.y + dy)


def sprite_path(noun: str, style: str) -> Path:
    """Where the sprite of `noun` in `style` is, or would be if there is none."""
    return SPRITES / style / f"{noun}.webp"


def noun_phrase(noun: str) -> str:
    """`coffee_cup` → "a coffee cup", `owl` → "an owl", `glasses` → "glasses"."""
    words = noun.replace("_", " ")
    if noun in _PLURALS:
        return words
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def place_phrase(background: str) -> str:
    """`beach` → "on the beach", `red` → "on a red background"."""
    return PLACES.get(background) or f"on {'an' if background[0] in 'aeiou' else 'a'} {background} background"


def captions(scene: Scene) -> tuple[str, ...]:
    """Every true caption of `scene`.

    Each names the objects and the background; the first one also names the style, if all objects have the same and
    none is varied.  Two objects are named in each order, and once as left and right.
    """
    where = place_phrase(scene.background)
    things = sorted(scene.objects, key=lambda thing: thing.x)
    phrases = [noun_phrase(thing.noun) for thing in things]
    styles = {thing.style if thing.variation is None else None for thing in things}
    prefixes = [f"{STYLES[things[0].style]} "] if len(styles) == 1 and None not in styles else []
    prefixes += [f"{ANY_STYLE} ", ""]
    subjects = [" and ".join(phrases)]
    if len(phrases) == 2:
        subjects += [f"{phrases[1]} and {phrases[0]}", f"{phrases[0]} on the left and {phrases[1]} on the right"]
    texts = [f"{prefix}{subject} {where}" for subject in subjects for prefix in prefixes]
    return tuple(texts)


def random_scene(
    seed: int,
    *,
    split: str = "train",
    nouns: Sequence[str] = NOUNS,
    styles: Sequence[str] = TRAINING_STYLES,
    backgrounds: Sequence[str] = BACKGROUNDS,
    objects: int | None = None,
) -> Scene:
    """Scene number `seed` of the data split `split`; the random numbers of different splits are independent.

    A scene has one object of size 0.50–0.78, or two of size 0.32–0.44 with different nouns and the same style, one in
    each half of the frame.  Angles are within ±10°.

    objects: 1 or 2; None for two objects in a third of the scenes.

    Raises:
        ValueError: another number of objects.
    """
    rng = np.random.default_rng([crc32(split.encode()), seed])
    count = objects if objects is not None else (2 if rng.random() < 1 / 3 else 1)
    if count not in (1, 2):
        raise ValueError(f"a scene has one or two objects, got {count}")
    style = str(rng.choice(list(styles)))
    known = [noun for noun in nouns if sprite_path(noun, style).is_file()]
    chosen = [str(noun) for noun in rng.choice(known, size=count, replace=False)]
    low, high = (0.50, 0.78) if count == 1 else (0.32, 0.44)
    things = []
    for index, noun in enumerate(chosen):
        size = float(rng.uniform(low, high))
        half_width = size / 2 + 0.01
        x = 0.5 + float(rng.uniform(-1, 1)) * (0.5 - half_width) if count == 1 else 0.25 + 0.5 * index
        x += float(rng.uniform(-1, 1)) * max(0.0, 0.25 - half_width) * (count == 2)
        y = 0.5 + float(rng.uniform(-1, 1)) * (0.5 - half_width)
        angle = float(rng.uniform(-10, 10))
        things.append(SceneObject(noun, style, x, y, size, angle, bool(rng.random() < 0.5)))
    return Scene(str(rng.choice(list(backgrounds))), tuple(things))


def varied_scene(scene: Scene, seed: int) -> Scene:
    """`scene` with a random variation of each object, determined by `seed`."""
    rng = np.random.default_rng([crc32(b"variation"), seed])
    return replace(scene, objects=tuple(replace(thing, variation=random_variation(rng)) for thing in scene.objects))


def render(
    scene: Scene, size: int = 128, background: np.ndarray | None = None
) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """Render `scene` as an RGB image (size, size, 3) uint8, with one boolean mask (size, size) per object.

    A mask is True at the pixels of which its object covers more than half and no object in front of it does.

    background: RGB (size, size, 3) in [0, 1], in place of the scene's own.
    """
    canvas = (paint_background(scene.background, size) if background is None else background).copy()
    masks: list[np.ndarray] = []
    for thing in scene.objects:
        colour, alpha = _render_object(thing, size)
        shadow = _shadow(alpha)
        canvas *= 1 - 0.3 * shadow[..., None] * (1 - alpha[..., None])
        canvas = canvas * (1 - alpha[..., None]) + colour
        solid = alpha > 0.5
        masks = [mask & ~solid for mask in masks] + [solid]
    return (canvas.clip(0, 1) * 255 + 0.5).astype(np.uint8), tuple(masks)


@lru_cache(maxsize=512)
def _sprite(noun: str, style: str) -> Image.Image:
    return Image.open(sprite_path(noun, style)).convert("RGBA")


def _render_object(thing: SceneObject, size: int) -> tuple[np.ndarray, np.ndarray]:
    """One object alone: premultiplied colour (size, size, 3) and alpha (size, size), both in [0, 1]."""
    sprite = _sprite(thing.noun, thing.style)
    if thing.variation is not None:
        sprite = vary(sprite, thing.variation)
    if thing.flip:
        sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    scale = thing.size * size / max(sprite.size)
    width, height = (max(1, round(side * scale)) for side in sprite.size)
    sprite = sprite.resize((width, height), Image.Resampling.LANCZOS)
    sprite = sprite.rotate(thing.angle, Image.Resampling.BICUBIC, expand=True)
    frame = Image.new("RGBA", (size, size))
    frame.paste(sprite, (round(thing.x * size - sprite.width / 2), round(thing.y * size - sprite.height / 2)))
    pixels = np.asarray(frame, np.float32) / 255
    return pixels[..., :3] * pixels[..., 3:], pixels[..., 3]


def _shadow(alpha: np.ndarray) -> np.ndarray:
    """An object's soft shadow (size, size) in [0, 1]: `alpha` shifted a little down and to the right, and blurred."""
    size = len(alpha)
    down, right = round(0.02 * size), round(0.012 * size)
    shifted = np.zeros_like(alpha)
    shifted[down:, right:] = alpha[: size - down, : size - right]
    image = Image.fromarray((shifted * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.018 * size))
    return np.asarray(image, np.float32) / 255
