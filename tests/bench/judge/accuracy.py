"""How often the judge is right on held-out scenes: as rendered, blurred, resampled, compressed, autoencoded.

python -m tests.bench.judge.accuracy --n 2000
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro
from PIL import Image

from personalize.embedded.scenes import STYLES, Scene, random_scene, render
from tests.bench.judge.degradation import blurred, shrunk
from tests.bench.judge.judge import SIDE, THRESHOLD, WEIGHTS, Judge, Verdict, as_bytes, as_pixels

BATCH = 100  # scenes at a time
Change = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class AccuracyOptions:
    weights: Path = WEIGHTS
    """Weights of the judge (or of another network of its kind)."""
    split: str = "judge-test"
    """Data split of the scenes, which have all nouns and styles."""
    n: int = 2000
    """Number of scenes."""
    autoencoder: Path | None = None
    """A Stable Diffusion folder: measure also on pictures passed through its autoencoder."""


def judged_scene(split: str, index: int) -> Scene:
    """Scene number `index` of `split`, of any noun and style; every 25th has no object."""
    scene = random_scene(index, split=split, styles=tuple(STYLES))
    return replace(scene, objects=()) if index % 25 == 24 else scene


def accuracy(judge: Judge, split: str, count: int, *, side: int = 2 * SIDE, change: Change | None = None) -> dict:
    """Shares of scenes 0 … count − 1 of `split` on which nouns, background, style, and all three are right.

    Nouns are right if exactly the true ones have a probability above `THRESHOLD`; background and style, if the most
    probable one is the true one.  The style of a scene without objects counts as right.

    side: at which scenes are rendered, px.
    change: applied to the renders, uint8 (b, H, W, 3), before the judge sees them.
    """
    right = []
    for start in range(0, count, BATCH):
        world = [judged_scene(split, index) for index in range(start, min(count, start + BATCH))]
        images = np.stack([render(scene, side)[0] for scene in world])
        verdicts = judge(images if change is None else change(images))
        right += [_right(scene, verdict) for scene, verdict in zip(world, verdicts, strict=True)]
    table = np.array(right)
    shares = dict(zip(("nouns", "background", "style"), table.mean(0).round(5).tolist(), strict=True))
    return {"split": split, "n": count, "threshold": THRESHOLD, "all": round(float(table.all(1).mean()), 5), **shares}


def _right(scene: Scene, verdict: Verdict) -> tuple[bool, bool, bool]:
    nouns = {thing.noun for thing in scene.objects}
    styles = {thing.style for thing in scene.objects}
    return verdict.nouns == nouns, verdict.background == scene.background, not styles or verdict.style in styles


def softened(images: np.ndarray) -> np.ndarray:
    """Gaussian blur of standard deviation 1.2 px."""
    return as_bytes(blurred(as_pixels(images), 1.2))


def halved(images: np.ndarray) -> np.ndarray:
    """Resampled to half the size and back."""
    return as_bytes(shrunk(as_pixels(images), 0.5))


def compressed(images: np.ndarray) -> np.ndarray:
    """Compressed as JPEG of quality 40."""
    files = [io.BytesIO() for _ in images]
    for image, file in zip(images, files, strict=True):
        Image.fromarray(image).save(file, "JPEG", quality=40)
    return np.stack([np.asarray(Image.open(file)) for file in files])


def autoencoded(folder: Path) -> Change:
    """A function that passes pictures through the autoencoder of the model in `folder`."""
    from personalize.models.stable_diffusion import StableDiffusion  # slow to import, and not needed to train the judge

    model = StableDiffusion.load(folder)
    return lambda images: as_bytes(model.decode(model.encode(as_pixels(images))))


def main(options: AccuracyOptions) -> None:
    """Print one JSON line for each kind of picture."""
    judge = Judge.load(options.weights)
    changes: dict[str, Change | None] = {"as rendered": None}
    changes |= {change.__name__: change for change in (softened, halved, compressed)}
    if options.autoencoder is not None:
        changes["autoencoded"] = autoencoded(options.autoencoder)
    for name, change in changes.items():
        print(json.dumps({"pictures": name, **accuracy(judge, options.split, options.n, change=change)}), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(tyro.cli(AccuracyOptions))
