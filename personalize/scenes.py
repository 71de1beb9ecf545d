"""A small world with exact ground truth: openly licensed emoji art at known places on known backgrounds.

A `Scene` is a value.  Rendering it is deterministic, its masks are exact, its captions are true, and because it
is a value the true result of an edit is another scene, rendered again:

    before = random_scene(7)
    after = before.with_background("beach")          # what "… on the beach" ought to look like

Coordinates are fractions of the frame (x to the right, y down), so one scene renders at every size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from zlib import crc32

import numpy as np
from PIL import Image, ImageFilter

from personalize.backgrounds import COLOURS, painted

SPRITES = Path(__file__).parent / "sprites"

STYLES = {
    "3d": "a render of",
    "drawing": "a drawing of",
    "modern": "an icon of",
    "flat": "a sticker of",
}
ANY_STYLE = "a picture of"
HELD_OUT_STYLE = "flat"  # never shown to the autoencoder, the text encoder or the UNet
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
    """One sprite: its longest side is `size` of the frame, its centre (`x`, `y`), turned by `angle` degrees."""

    noun: str
    style: str
    x: float = 0.5
    y: float = 0.5
    size: float = 0.6
    angle: float = 0.0
    flip: bool = False

    def __post_init__(self) -> None:
        if self.style not in STYLES:
            raise ValueError(f"unknown style {self.style!r}: choose one of {', '.join(STYLES)}")
        if not sprite_path(self.noun, self.style).is_file():
            raise ValueError(f"no sprite of a {self.noun!r} in style {self.style!r}; nouns: {', '.join(NOUNS)}")


@dataclass(frozen=True)
class Scene:
    """A background and its objects, later ones in front."""

    background: str
    objects: tuple[SceneObject, ...]

    def __post_init__(self) -> None:
        if self.background not in BACKGROUNDS:
            raise ValueError(f"unknown background {self.background!r}: choose one of {', '.join(BACKGROUNDS)}")

    def with_background(self, background: str) -> Scene:
        return replace(self, background=background)

    def with_object(self, index: int, **changes: object) -> Scene:
        """This scene with fields of object `index` replaced, e.g. `with_object(0, noun="dog")`."""
        objects = list(self.objects)
        objects[index] = replace(objects[index], **changes)  # type: ignore[arg-type]
        return replace(self, objects=tuple(objects))

    def with_style(self, style: str) -> Scene:
        return replace(self, objects=tuple(replace(thing, style=style) for thing in self.objects))

    def moved(self, index: int, dx: float, dy: float) -> Scene:
        """This scene with object `index` shifted by (`dx`, `dy`) fractions of the frame."""
        thing = self.objects[index]
        return self.with_object(index, x=thing.x + dx, y=thing.y + dy)


def sprite_path(noun: str, style: str) -> Path:
    return SPRITES / style / f"{noun}.webp"


def noun_phrase(noun: str) -> str:
    """`coffee_cup` → "a coffee cup", `owl` → "an owl", `glasses` → "glasses"."""
    words = noun.replace("_", " ")
    if noun in _PLURALS:
        return words
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def place_phrase(background: str) -> str:
    return PLACES.get(background) or f"on {'an' if background[0] in 'aeiou' else 'a'} {background} background"


def captions(scene: Scene) -> tuple[str, ...]:
    """Every true caption of `scene`: naming its style or not; of two objects, in each order, or left and right."""
    where = place_phrase(scene.background)
    things = sorted(scene.objects, key=lambda thing: thing.x)
    phrases = [noun_phrase(thing.noun) for thing in things]
    styles = {thing.style for thing in things}
    prefixes = [f"{STYLES[things[0].style]} "] if len(styles) == 1 else []
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
    """Draw scene number `seed` of `split`: streams of different splits are disjoint by construction.

    One object has size 0.50–0.78; two (a third of the scenes when `objects` is None) have size 0.32–0.44, one in
    each half of the frame, of different nouns and the same style.  Angles lie within ±10°.
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


def render(scene: Scene, size: int = 128) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """Draw `scene`: an RGB image (size, size, 3) uint8 and one boolean mask (size, size) per object.

    A mask holds the pixels of which its object covers more than half and no object before it covers more than half.
    """
    canvas = painted(scene.background, size).copy()  # (size, size, 3) float in [0, 1]
    masks: list[np.ndarray] = []
    for thing in scene.objects:
        colour, alpha = _placed(thing, size)
        shadow = _shadow(alpha)
        canvas *= 1 - 0.3 * shadow[..., None] * (1 - alpha[..., None])
        canvas = canvas * (1 - alpha[..., None]) + colour
        solid = alpha > 0.5
        masks = [mask & ~solid for mask in masks] + [solid]
    return (canvas.clip(0, 1) * 255 + 0.5).astype(np.uint8), tuple(masks)


@lru_cache(maxsize=512)
def _sprite(noun: str, style: str) -> Image.Image:
    return Image.open(sprite_path(noun, style)).convert("RGBA")


def _placed(thing: SceneObject, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The turned sprite on an empty frame: premultiplied colour (size, size, 3) and alpha (size, size), in [0, 1]."""
    art = _sprite(thing.noun, thing.style)
    if thing.flip:
        art = art.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    scale = thing.size * size / max(art.size)
    art = art.resize((max(1, round(art.width * scale)), max(1, round(art.height * scale))), Image.Resampling.LANCZOS)
    art = art.rotate(thing.angle, Image.Resampling.BICUBIC, expand=True)
    frame = Image.new("RGBA", (size, size))
    frame.paste(art, (round(thing.x * size - art.width / 2), round(thing.y * size - art.height / 2)))
    pixels = np.asarray(frame, np.float32) / 255
    return pixels[..., :3] * pixels[..., 3:], pixels[..., 3]


def _shadow(alpha: np.ndarray) -> np.ndarray:
    """A soft shadow (size, size) in [0, 1]: `alpha` blurred, and shifted a little down and to the right."""
    size = len(alpha)
    down, right = round(0.02 * size), round(0.012 * size)
    shifted = np.zeros_like(alpha)
    shifted[down:, right:] = alpha[: size - down, : size - right]
    image = Image.fromarray((shifted * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.018 * size))
    return np.asarray(image, np.float32) / 255
