"""Five sample pictures that ship with the package, each with four edits to try.

Their subjects are drawn in an art style that the embedded model was not trained on.
"""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

from personalize.embedded.scenes import HELD_OUT_STYLE, Scene, SceneObject, captions, render
from personalize.errors import UserError


@dataclass(frozen=True)
class SampleEdit:
    """An edit of a sample picture: its kind ("background", "object", "style"), its prompt, and its true result.

    truth: the scene that the edit asks for; None if it is not known.
    """

    kind: str
    prompt: str
    truth: Scene | None = None


@dataclass(frozen=True)
class SampleImage:
    """A picture to learn, its caption, and edits to try on it.

    scene: what the picture was rendered from; None for a user's own picture.
    """

    picture: Image.Image
    caption: str
    edits: tuple[SampleEdit, ...]
    scene: Scene | None = None


_SUBJECTS = (  # noun, background, size, two other backgrounds, another noun
    ("cat", "blue", 0.66, ("beach", "snow"), "dog"),
    ("fox", "grass", 0.62, ("night", "red"), "panda"),
    ("owl", "wood", 0.64, ("teal", "desert"), "penguin"),
    ("car", "gray", 0.66, ("desert", "green"), "bus"),
    ("strawberry", "yellow", 0.60, ("water", "purple"), "apple"),
)


def bundled(index: int) -> SampleImage:
    """Sample picture `index` (0 to 4), with four edits: two other backgrounds, another object, another style.

    Raises:
        UserError: there is no sample of that number.
    """
    if not 0 <= index < len(_SUBJECTS):
        raise UserError(f"there is no bundled scene {index}: choose 0 to {len(_SUBJECTS) - 1}")
    noun, background, size, places, other = _SUBJECTS[index]
    scene = Scene(background, (SceneObject(noun, HELD_OUT_STYLE, 0.5, 0.53, size),))
    swapped, drawing = scene.with_object(0, noun=other), scene.with_style("drawing")
    edits = [SampleEdit("background", unstyled_caption(after), after) for after in map(scene.with_background, places)]
    edits.append(SampleEdit("object", unstyled_caption(swapped), swapped))
    edits.append(SampleEdit("style", captions(drawing)[0], drawing))
    return SampleImage(Image.fromarray(render(scene)[0]), unstyled_caption(scene), tuple(edits), scene)


def unstyled_caption(scene: Scene) -> str:
    """The caption that names no style, but has as many words as those that do: "a picture of a cat on the beach"."""
    return captions(scene)[1]
