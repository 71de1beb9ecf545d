"""The five scenes that ship with the package: subjects in an art style the embedded model has never seen."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

from personalize.errors import UserError
from personalize.scenes import HELD_OUT_STYLE, Scene, SceneObject, captions, render


@dataclass(frozen=True)
class Change:
    """One edit: the `kind` of it, the `prompt` that asks for it, and the scene that would be its true outcome."""

    kind: str
    prompt: str
    truth: Scene | None = None


@dataclass(frozen=True)
class Example:
    """A picture to learn, what it shows, and edits to try on it; `scene` is what it was rendered from, if it was."""

    picture: Image.Image
    caption: str
    changes: tuple[Change, ...]
    scene: Scene | None = None


_SUBJECTS = (  # noun, background, size, two other backgrounds, another noun
    ("cat", "blue", 0.66, ("beach", "snow"), "dog"),
    ("fox", "grass", 0.62, ("night", "red"), "panda"),
    ("owl", "wood", 0.64, ("teal", "desert"), "penguin"),
    ("car", "gray", 0.66, ("desert", "green"), "bus"),
    ("strawberry", "yellow", 0.60, ("water", "purple"), "apple"),
)


def bundled(index: int) -> Example:
    """Scene `index`, with four edits: two backgrounds, another object, another style.

    Raises:
        UserError: there is no such scene.
    """
    if not 0 <= index < len(_SUBJECTS):
        raise UserError(f"there is no bundled scene {index}: choose 0 to {len(_SUBJECTS) - 1}")
    noun, background, size, places, other = _SUBJECTS[index]
    scene = Scene(background, (SceneObject(noun, HELD_OUT_STYLE, 0.5, 0.53, size),))
    drawn = scene.with_style("drawing")
    changes = [Change("background", wording(after), after) for after in map(scene.with_background, places)]
    changes.append(Change("object", wording(scene.with_object(0, noun=other)), scene.with_object(0, noun=other)))
    changes.append(Change("style", captions(drawn)[0], drawn))
    return Example(Image.fromarray(render(scene)[0]), wording(scene), tuple(changes), scene)


def wording(scene: Scene) -> str:
    """The caption that names no style but is worded like those that do: "a picture of a cat on the beach"."""
    return captions(scene)[1]
