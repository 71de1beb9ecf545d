"""The three drags that left remnants when tried by hand, rendered again: a car, an apple, a cat; before and after.

    python -m tests.bench.drag.examples                # writes drag_examples.png and prints what remains of each

"Before" is `--method latents`, which was the only way when the remnants were seen; "after" are the defaults.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tyro
from PIL import Image

from personalize.editing.drag.config import DEFAULTS
from personalize.editing.drag.image import drag_picture
from personalize.embedded.scenes import Scene, SceneObject, captions, render
from personalize.io.figures import grid
from personalize.models.stable_diffusion import EMBEDDED, StableDiffusion
from tests.bench.drag.measures import away_from, background_only, ghost, handle_point

WAY = 0.3  # of the frame, to the right


@dataclass(frozen=True)
class Examples:
    model: Path = EMBEDDED
    """A Stable Diffusion folder."""
    output: Path = Path("runs/bench/drag_examples.png")
    """Where the sheet goes."""


def scenes() -> dict[str, Scene]:
    """A car on the beach, an apple on wood, a cat on the grass."""
    things = {"car": "beach", "apple": "wood", "cat": "grass"}
    return {noun: Scene(ground, (SceneObject(noun, "3d", 0.32, 0.55, 0.36),)) for noun, ground in things.items()}


def run(options: Examples) -> dict[str, dict[str, float]]:
    """Draw and save the sheet; returns the share of each thing that is left, by thing and method."""
    model, rows, table = StableDiffusion.load(options.model), [], dict[str, dict[str, float]]()
    for noun, scene in scenes().items():
        size, last = model.resolution, scene.with_object_shifted(0, WAY, 0)
        (before, (mask,)), (truth, (end,)) = render(scene, size), render(last, size)
        x, y = handle_point(mask)
        drawn = {
            method: np.asarray(
                drag_picture(
                    model, Image.fromarray(before), [(x, y), (x + round(WAY * size), y)], prompt=captions(scene)[-1],
                    settings=replace(DEFAULTS, method=method),
                ).image
            )
            for method in ("latents", "pixels")
        }  # fmt: skip
        left, ground = mask & away_from([end], 1, 1), background_only(scene, size)
        table[noun] = {method: ghost(picture, before, ground, left, mask) for method, picture in drawn.items()}
        rows.append([Image.fromarray(picture) for picture in (before, *drawn.values(), truth)])
    options.output.parent.mkdir(parents=True, exist_ok=True)
    names = ("source", "before: latents", "after: pixels", "truth")
    grid(rows, columns=names, labels=list(table), cell=192).save(options.output)
    return table


if __name__ == "__main__":
    print(json.dumps(run(tyro.cli(Examples, config=(tyro.conf.OmitArgPrefixes,))), indent=1))
