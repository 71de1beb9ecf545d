"""Things turned and scaled in place, against the scene rendered so.

A turn is a drag of three points in the mode `region`: the handle and two points beside it.  What it drew is measured by
the angle and the scale at which the scene, rendered again, looks most like the result where the object is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
from PIL import Image

from personalize.editing.drag.config import DragSettings
from personalize.editing.drag.image import drag_picture
from personalize.embedded.scenes import Scene, SceneObject, render
from personalize.models.stable_diffusion import StableDiffusion
from tests.bench.drag.measures import away_from, centroid, handle_point
from tests.bench.figure_tables import average, proportion
from tests.bench.picture_measures import iou, psnr

REACH = 0.05  # of the frame: distance of the further points from the handle
ANGLES = tuple(range(-20, 55, 5))  # degrees, among which the drawn angle is searched
SCALES = tuple(round(0.8 + 0.1 * index, 1) for index in range(9))  # likewise


@dataclass(frozen=True)
class Turn:
    """A turn by `angle`, in degrees and counterclockwise, and a scale."""

    name: str
    angle: float
    scale: float

    def scenes(self, scene: Scene) -> tuple[Scene, Scene]:
        """The first object of `scene` alone in the middle of the frame, before and after the turn."""
        thing = replace(scene.objects[0], x=0.5, y=0.5)
        return Scene(scene.background, (thing,)), Scene(scene.background, (turned(thing, self.angle, self.scale),))

    def points(self, mask: np.ndarray, end: np.ndarray) -> list[tuple[float, float]]:
        """Handle, target, handle, target, … that take the object from `mask` to `end`, the masks' centroids included.

        Scenes place things on whole pixels, so that an object's centroid moves by up to a pixel when it is turned.
        """
        (x, y), (left, top), (right, bottom) = handle_point(mask), centroid(mask), centroid(end)
        cosine, sine = (self.scale * part(math.radians(self.angle)) for part in (math.cos, math.sin))
        reach, points = REACH * len(mask), []
        for a, b in ((x, y), (x + reach, y), (x, y + reach)):
            dx, dy = a - left, b - top
            points += [(a, b), (right + cosine * dx + sine * dy, bottom - sine * dx + cosine * dy)]
        return points


TURNS = (Turn("turn by 30°", 30.0, 1.0), Turn("scale by 1.4", 0.0, 1.4), Turn("turn by 30°, scale by 1.4", 30.0, 1.4))


def turned(thing: SceneObject, angle: float, scale: float) -> SceneObject:
    """`thing`, turned and scaled about its middle."""
    return replace(thing, size=thing.size * scale, angle=thing.angle + angle)


def turn_row(
    model: StableDiffusion, scene: Scene, ground: np.ndarray | None, prompt: str, settings: DragSettings, turn: Turn
) -> tuple[dict[str, Any], np.ndarray]:
    """The measures of one whole drag of the object of `scene`, and the picture it gave."""
    first, last = turn.scenes(scene)
    size = model.resolution
    (before, (mask,)), (truth, (end,)) = render(first, size, ground), render(last, size, ground)
    result = drag_picture(
        model, Image.fromarray(before), turn.points(mask, end), prompt=prompt, settings=replace(settings, mode="region")
    )
    assert result.preview is not None
    picture, touched = np.asarray(result.image), ~away_from([mask, end], model.factor, 1)
    angle, scale = found_turn(picture, first, ground)
    row = {
        "turn": turn.name, "iou": iou(result.preview.drag.covered.numpy()[:size, :size], end),
        "truth_db": psnr(picture, truth, touched), "nothing_db": psnr(before, truth, touched),
        "background_db": psnr(picture, truth, ~touched), "angle": angle, "scale": scale,
        "right": abs(angle - turn.angle) <= 5 and abs(scale - turn.scale) <= 0.1 + 1e-9,
    }  # fmt: skip
    return row, picture


def found_turn(picture: np.ndarray, scene: Scene, ground: np.ndarray | None) -> tuple[float, float]:
    """The angle and the scale at which the object of `scene`, rendered again, differs least from `picture`."""

    def error(turn: tuple[float, float]) -> float:
        things = (turned(scene.objects[0], *turn),)
        rendered, _ = render(Scene(scene.background, things), len(picture), ground)
        return float(np.square(rendered.astype(float) - picture).mean())

    return min(product(ANGLES, SCALES), key=error)


def turn_figures(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means with their intervals: {"turn by 30°: IoU": …}."""
    table: dict[str, Any] = {}
    for turn in TURNS:
        mine = [row for row in rows if row["turn"] == turn.name]
        table[f"{turn.name}: found so, to 5° and 0.1"] = proportion([row["right"] for row in mine])
        for name, unit in (("iou", ""), ("truth_db", "dB"), ("nothing_db", "dB"), ("background_db", "dB")):
            table[f"{turn.name}: {name}"] = average([row[name] for row in mine], unit)
    return table
