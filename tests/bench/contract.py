"""What every bench of edits measures, and how: the edit, its true result, success, and identity within a region.

background: the same objects on another background.  Identity is measured inside the objects' masks.
    Success: the judge sees the new background and every object.
object: one object's noun is replaced.  Identity is measured outside the masks of the old and the new object.
    Success: the judge sees the new noun and not the old one.
style: all objects in another style.  Identity is measured outside the objects' masks.
    Success: the judge sees the new style inside every object's mask, and every noun.
move: one object at another position.  Identity is measured in the whole frame.
    Success: the judge sees the noun nearer to its new position than to its old one.

Likeness, where objects are to stay what they are (background, move, an object's neighbours): the least cosine, over
those objects, between a network's embeddings of the object before and of what the edit shows in its place.

Every bench has two controls: doing nothing, and the base model without adapter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from PIL import Image

from personalize.embedded.scenes import (
    BACKGROUNDS,
    NOUNS,
    TRAINING_STYLES,
    Scene,
    captions,
    random_scene,
    render,
    sprite_path,
)
from tests.bench.cells import Cells
from tests.bench.judge.judge import Judge, Verdict
from tests.bench.judge.likeness import Likeness
from tests.bench.picture_measures import identity

KINDS = ("background", "object", "style", "move")
DO_NOTHING, BASE = "do nothing", "base without adapter"
CONTROLS = (DO_NOTHING, BASE)


@dataclass(frozen=True)
class Task:
    """One edit, from the scene `before` to the scene `after`; `index` is the object that an object or move changes."""

    kind: str
    name: str
    before: Scene
    after: Scene
    index: int = 0

    @property
    def source_prompt(self) -> str:
        return caption(self.before)

    @property
    def target_prompt(self) -> str:
        return caption(self.after, styled=self.kind == "style")

    @property
    def swapped_words(self) -> list[tuple[str, str]]:
        """Each noun that changes, before and after, as captions write it."""
        return [pair for pair in zip(self.before.words, self.after.words, strict=True) if pair[0] != pair[1]]


def caption(scene: Scene, *, styled: bool = False) -> str:
    """The caption of `scene` that names no style ("a picture of …"), or the one that names its style."""
    texts = captions(scene)
    one_style = len({thing.style for thing in scene.objects}) == 1
    return texts[1] if one_style and not styled else texts[0]


def random_task(
    kind: str,
    seed: int,
    *,
    split: str = "bench",
    nouns: Sequence[str] = NOUNS,
    styles: Sequence[str] = TRAINING_STYLES,
    new_styles: Sequence[str] = TRAINING_STYLES,
    backgrounds: Sequence[str] = BACKGROUNDS,
    objects: int | None = 1,
) -> Task:
    """Task number `seed` of the split: a random scene and one random edit of it.

    styles: of the scene before.  new_styles: that an edit of the style may choose.
    objects: of the scene, 1 or 2, None for either; a move has one small object and takes it 0.15–0.5 of the frame away.

    Raises:
        ValueError: an unknown kind, or nothing to change to.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind of edit {kind!r}: choose one of {', '.join(KINDS)}")
    rng = np.random.default_rng([crc32(f"{split}/{kind}".encode()), seed])
    objects = 1 if kind == "move" else objects
    scene = random_scene(seed, split=split, nouns=nouns, styles=styles, backgrounds=backgrounds, objects=objects)
    index = int(rng.integers(len(scene.objects)))
    before, after = scene, scene
    if kind == "background":
        after = scene.with_background(_other(rng, backgrounds, {scene.background}))
    elif kind == "object":
        taken = {thing.noun for thing in scene.objects}
        known = [noun for noun in nouns if sprite_path(noun, scene.objects[index].style).is_file()]
        after = scene.with_object(index, noun=_other(rng, known, taken))
    elif kind == "style":
        complete = [s for s in new_styles if all(sprite_path(thing.noun, s).is_file() for thing in scene.objects)]
        after = scene.with_style(_other(rng, complete, {thing.style for thing in scene.objects}))
    else:
        before, after = _two_positions(rng, scene)
    return Task(kind, f"{kind}/{split}/{seed}", before, after, index)


def _other(rng: np.random.Generator, choices: Sequence[str], taken: set[str]) -> str:
    left = [choice for choice in choices if choice not in taken]
    if not left:
        raise ValueError(f"nothing to change to: {sorted(choices)} without {sorted(taken)} is empty")
    return str(rng.choice(left))


def _two_positions(rng: np.random.Generator, scene: Scene) -> tuple[Scene, Scene]:
    """The scene with its object at two random positions, 0.15 to 0.5 of the frame apart."""
    size = float(rng.uniform(0.32, 0.46))
    while True:
        x, y, u, v = (float(value) for value in rng.uniform(size / 2 + 0.01, 1 - size / 2 - 0.01, 4))
        if 0.15 <= math.hypot(u - x, v - y) <= 0.5:
            return scene.with_object(0, x=x, y=y, size=size), scene.with_object(0, x=u, y=v, size=size)


def region(task: Task, size: int) -> np.ndarray:
    """The region in which identity is measured, boolean (size, size)."""
    if task.kind == "move":
        return np.ones((size, size), bool)
    before, after = render(task.before, size)[1], render(task.after, size)[1]
    if task.kind == "background":
        return np.any(before, axis=0)
    if task.kind == "object":
        return ~(before[task.index] | after[task.index])
    return ~np.any([*before, *after], axis=0)


def success(task: Task, verdict: Verdict, styles: Sequence[str]) -> bool:
    """Whether the edit succeeded, by its kind's rule; `styles` are what the judge sees inside the objects' masks."""
    before, after = task.before.objects[task.index], task.after.objects[task.index]
    nouns = {thing.noun for thing in task.after.objects}
    if task.kind == "background":
        return verdict.background == task.after.background and nouns <= verdict.nouns
    if task.kind == "object":
        return after.noun in verdict.nouns and before.noun not in verdict.nouns
    if task.kind == "style":
        return nouns <= verdict.nouns and list(styles) == [thing.style for thing in task.after.objects]
    seen = verdict.places.get(after.noun)
    return seen is not None and math.dist(seen, (after.x, after.y)) < math.dist(seen, (before.x, before.y))


@dataclass(frozen=True)
class Score:
    """How well one edited picture meets its task; psnr, colour and structure compare it with the truth in the region.

    whole_scene: the judge sees exactly the true nouns and the true background.
    psnr: dB, at most 60.
    colour: earth mover's distance of the L*, a* and b* distributions, averaged over the three, in ΔE.
    structure: relative difference of the gradients, from 0 (the same) to 1 (nothing in common).
    likeness: cosine in [−1, 1], above 0.8 for 95 % of views of one thing; None if nothing is to stay what it is.
    """

    success: bool
    whole_scene: bool
    psnr: float
    colour: float
    structure: float
    likeness: float | None


def score(task: Task, picture: np.ndarray | Image.Image, judge: Judge) -> Score:
    """Score an edited picture, RGB uint8 (H, W, 3), against the truth rendered at its size."""
    picture = np.asarray(picture.convert("RGB") if isinstance(picture, Image.Image) else picture)
    truth, masks = render(task.after, len(picture))
    verdict = judge(picture)[0]
    styles = [judge.style_inside(picture, mask) for mask in masks] if task.kind == "style" else []
    nouns = {thing.noun for thing in task.after.objects}
    whole = verdict.nouns == nouns and verdict.background == task.after.background
    figures = identity(picture, truth, region(task, len(picture)))
    return Score(success(task, verdict, styles), whole, **figures, likeness=likeness(task, picture))


def likeness(task: Task, picture: np.ndarray) -> float | None:
    """The least likeness of an object that is to stay what it is, before the edit and at its true place after it."""
    stays = [
        i for i in range(len(task.before.objects)) if task.kind != "style" and (task.kind, i) != ("object", task.index)
    ]
    (before, masks), places = render(task.before, len(picture)), render(task.after, len(picture))[1]
    compared = [_likeness()(before, masks[i], picture, places[i]) for i in stays if masks[i].any() and places[i].any()]
    return min(compared, default=None)


@cache
def _likeness() -> Likeness:
    return Likeness.load()


Arm = Callable[[Task, np.ndarray, int], Sequence[np.ndarray]]
"""A method under test: (task, picture before, budget) → at most `budget` candidates, each RGB uint8 (H, W, 3)."""
Selector = Callable[[Task, Sequence[np.ndarray]], int]
"""(task, candidates) → the index of the candidate to keep; it must not use the judge."""


def do_nothing(task: Task, before: np.ndarray, budget: int) -> Sequence[np.ndarray]:
    """The control that returns the picture unchanged."""
    return [before]


def keep_first(task: Task, candidates: Sequence[np.ndarray]) -> int:
    """The selector that keeps the first candidate."""
    return 0


def evaluate(
    tasks: Sequence[Task],
    arms: dict[str, Arm],
    cells: Cells,
    judge: Judge,
    *,
    budget: int = 1,
    size: int = 128,
    select: Selector = keep_first,
) -> list[dict[str, Any]]:
    """Run every arm on every task, with the same budget and selector for all; returns the rows of all cells.

    Cells that an earlier run finished are read, not run again.  Selected pictures are saved beside the cells' file.

    Raises:
        ValueError: `arms` lacks a control.
    """
    if missing := [name for name in CONTROLS if name not in arms]:
        raise ValueError(f"every bench has both controls, {missing} not among the arms {list(arms)}")
    rows = []
    for task in tasks:
        for name, arm in arms.items():
            key = f"{name}/{task.name}"
            if key not in cells:
                candidates = list(arm(task, render(task.before, size)[0], budget))[:budget]
                chosen = candidates[select(task, candidates)]
                file = picture_file(cells, key)
                file.parent.mkdir(exist_ok=True)
                Image.fromarray(chosen).save(file)
                head = {"arm": name, "kind": task.kind, "task": task.name}
                cells.add(key, head | asdict(score(task, chosen, judge)))
            rows.append(cells.rows[key])
    return rows


def picture_file(cells: Cells, key: str) -> Path:
    """The file of the selected picture of cell `key`."""
    return cells.path.with_suffix("") / f"{key.replace('/', '_').replace(' ', '_')}.png"
