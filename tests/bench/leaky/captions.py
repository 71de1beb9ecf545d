"""Scenes of one to three objects that look alike in part, and captions that leave some of them out.

    scene = leaky_scene(7)
    leaky_caption(scene, np.random.default_rng(7))       # "a render of a red apple and a red strawberry on the grass"

A model trained on them cannot tell from "an apple" alone that there is no strawberry, nor from "red" what is red: as
with the captions that Stable Diffusion was trained on, the cross-attention of a noun comes to cover other objects too.
"""

from __future__ import annotations

from collections.abc import Sequence
from zlib import crc32

import numpy as np

from personalize.embedded.scenes import ANY_STYLE, BACKGROUNDS, STYLES, Scene, SceneObject, noun_phrase, place_phrase

ALIKE = (  # nouns that share parts or colours
    ("cat", "dog", "fox", "pig"),
    ("panda", "penguin", "owl", "frog"),
    ("apple", "strawberry", "mushroom", "crab"),
    ("banana", "pineapple", "sunflower", "butterfly"),
    ("car", "bus", "rocket", "house"),
    ("fish", "donut", "guitar", "cactus"),
)
COLOURS = {  # of each noun's sprites in the styles 3d and drawing
    "cat": ("orange", "orange"), "dog": ("brown", "white"), "fox": ("orange", "orange"), "pig": ("pink", "pink"),
    "panda": ("white", "white"), "penguin": ("purple", "black"), "owl": ("brown", "brown"), "frog": ("green", "green"),
    "apple": ("red", "red"), "strawberry": ("red", "red"), "mushroom": ("red", "red"), "crab": ("red", "orange"),
    "banana": ("yellow", "yellow"), "pineapple": ("orange", "yellow"), "sunflower": ("yellow", "yellow"),
    "butterfly": ("red", "orange"), "car": ("red", "red"), "bus": ("teal", "white"), "rocket": ("white", "red"),
    "house": ("brown", "white"), "fish": ("blue", "teal"), "donut": ("brown", "brown"), "guitar": ("red", "red"),
    "cactus": ("green", "green"),
}  # fmt: skip
COLOURED_STYLES = ("3d", "drawing")
COUNT_SHARES = (0.2, 0.55, 0.25)  # of scenes with one, two and three objects
SIZES = ((0.50, 0.78), (0.32, 0.44), (0.24, 0.30))  # smallest and largest, of one, two and three objects
ALIKE_SHARE = 0.65  # of scenes whose objects are all of one group of ALIKE
NAMED_SHARE = 0.65  # of objects that the caption names, beside the first
COLOUR_SHARE = 0.8  # of named objects whose colour the caption names


def leaky_scene(seed: int, *, split: str = "leaky", styles: Sequence[str] = COLOURED_STYLES) -> Scene:
    """Scene number `seed` of the data split `split`: one to three objects of one style, each in a column of its own.

    Columns are of equal width.  Angles are within ±10°.
    """
    rng = np.random.default_rng([crc32(split.encode()), seed])
    count, style = 1 + int(rng.choice(3, p=COUNT_SHARES)), str(rng.choice(list(styles)))
    groups = ALIKE if rng.random() < ALIKE_SHARE else (tuple(COLOURS),)
    nouns = rng.choice(groups[int(rng.integers(len(groups)))], size=count, replace=False)
    objects = tuple(_random_object(rng, str(noun), style, column, count) for column, noun in enumerate(nouns))
    return Scene(str(rng.choice(list(BACKGROUNDS))), objects)


def _random_object(rng: np.random.Generator, noun: str, style: str, column: int, count: int) -> SceneObject:
    size = float(rng.uniform(*SIZES[count - 1]))
    half = size / 2 + 0.01
    x = (column + 0.5) / count + float(rng.uniform(-1, 1)) * max(0.0, 0.5 / count - half)
    y = 0.5 + float(rng.uniform(-1, 1)) * (0.5 - half)
    return SceneObject(noun, style, x, y, size, float(rng.uniform(-10, 10)), bool(rng.random() < 0.5))


def leaky_caption(scene: Scene, rng: np.random.Generator, named_share: float = NAMED_SHARE) -> str:
    """A true caption of `scene` that names at least one object, in any order, and the colour of most that it names.

    named_share: of the objects that it names beside the first.
    """
    order = rng.permutation(len(scene.objects))
    named = [scene.objects[i] for place, i in enumerate(order) if place == 0 or rng.random() < named_share]
    phrases = [_phrase(thing, coloured=bool(rng.random() < COLOUR_SHARE)) for thing in named]
    prefix = str(rng.choice([f"{STYLES[scene.objects[0].style]} ", f"{ANY_STYLE} ", ""]))
    return f"{prefix}{' and '.join(phrases)} {place_phrase(scene.background)}"


def _phrase(thing: SceneObject, *, coloured: bool) -> str:
    if not coloured:
        return noun_phrase(thing.noun)
    colour = COLOURS[thing.noun][COLOURED_STYLES.index(thing.style)]
    return f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {thing.noun.replace('_', ' ')}"
