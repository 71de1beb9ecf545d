"""Measures of point drags in scenes whose true result is known: where the object went, what remains, what changed.

Pictures are RGB uint8 (H, W, 3), masks boolean (H, W), shifts (x, y) in pixels.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from personalize.editing.drag.image import DragResult
from personalize.editing.drag.preview import DragPreview
from personalize.embedded.scenes import Scene, SceneObject, render
from tests.bench.attention_auc import coverage
from tests.bench.contract import Task
from tests.bench.picture_measures import psnr

Shift = tuple[float, float]
VISIBLE = 30.0  # grey levels, root mean square over the channels: a pixel that differs by more is not background


def drag_task(scene: Scene, seed: int, distance: float, *, twin: bool = False) -> Task:
    """The task to move the object of a one-object `scene` by `distance` (fraction of the frame) in a random direction.

    The object is made small, and lies within the frame before and after.
    twin: put a second object of the same noun into the other half of the frame, which must stay where it is.
    """
    rng, thing = np.random.default_rng([seed, 77]), scene.objects[0]
    size, limit = float(rng.uniform(0.26, 0.36)), (0.5 if twin else 1.0)
    while True:
        angle = float(rng.uniform(0, 2 * math.pi))
        dx, dy = distance * math.cos(angle), distance * math.sin(angle)
        x, y = (float(rng.uniform(size / 2, end - size / 2)) for end in (limit, 1.0))
        if size / 2 <= x + dx <= limit - size / 2 and size / 2 <= y + dy <= 1 - size / 2:
            break
        size = max(0.15, size * 0.98)  # a long drag within half a frame needs a smaller object
    others = (SceneObject(thing.noun, thing.style, 0.75, 0.5, 0.3),) if twin else ()
    before = Scene(
        scene.background, (SceneObject(thing.noun, thing.style, x, y, size, thing.angle, thing.flip), *others)
    )
    return Task(
        "move", f"drag/{distance:.4f}/{'twin/' if twin else ''}{seed}", before, before.with_object_shifted(0, dx, dy)
    )


def handle_point(mask: np.ndarray) -> tuple[float, float]:
    """The point to drag, (x, y): the pixel of `mask` nearest to the mask's centroid."""
    ys, xs = np.nonzero(mask)
    nearest = np.argmin((ys - ys.mean()) ** 2 + (xs - xs.mean()) ** 2)
    return float(xs[nearest]), float(ys[nearest])


def find_shift(picture: np.ndarray, template: np.ndarray, where: np.ndarray) -> Shift:
    """The whole-pixel shift s at which `picture` matches the part of `template` under the mask `where` best.

    s = argmin Σ_p where[p] ‖picture[p + s] − template[p]‖²,   over all s that keep `where` within the frame
    """
    height, width = where.shape
    size = (2 * height, 2 * width)

    def spectrum(image: np.ndarray) -> np.ndarray:
        return np.fft.rfft2(image.astype(np.float64), size, axes=(0, 1))

    weights = np.conj(spectrum(where))
    error = np.zeros(size)
    for channel in range(3):
        ours, theirs = picture[..., channel] / 255.0, template[..., channel] / 255.0 * where
        error += np.fft.irfft2(spectrum(ours**2) * weights - 2 * spectrum(ours) * np.conj(spectrum(theirs)), size)
    ys, xs = np.nonzero(where)
    rows = np.arange(-ys.min(), height - ys.max())
    columns = np.arange(-xs.min(), width - xs.max())
    best = np.argmin(error[np.ix_(rows, columns)])
    return float(columns[best % len(columns)]), float(rows[best // len(columns)])


def disc(shape: tuple[int, ...], point: tuple[float, float], radius: float) -> np.ndarray:
    """The mask of a disc around `point` (x, y), in pixels."""
    ys, xs = np.ogrid[: shape[0], : shape[1]]
    return (xs - point[0]) ** 2 + (ys - point[1]) ** 2 <= radius**2


def centroid_shift(picture: np.ndarray, before: np.ndarray, background: np.ndarray) -> Shift:
    """How far the centroid of the pixels that differ from the known `background` moved from `before` to `picture`."""
    points = [centroid(_differs(image, background)) for image in (before, picture)]
    return points[1][0] - points[0][0], points[1][1] - points[0][1]


def ghost(
    picture: np.ndarray, before: np.ndarray, background: np.ndarray, left: np.ndarray, thing: np.ndarray
) -> float:
    """Share of the object that remains where it should have left: pixels nearer to `before` than to the background.

    left: the mask of the region that the object should have left.  thing: the object's mask.
    """
    old, new = (np.square(picture.astype(float) - other).sum(-1) for other in (before, background))
    return float((left & (old < new) & _differs(before, background)).sum() / max(1, thing.sum()))


def away_from(masks: list[np.ndarray], cell: int, cells: int = 3) -> np.ndarray:
    """The mask of all pixels farther than `cells` latent cells (of `cell` pixels) from each of `masks`."""
    near = np.any(masks, axis=0)
    for _ in range(cells * cell):
        padded = np.pad(near, 1)
        near = padded[1:-1, 1:-1] | padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]
    return ~near


def seam(picture: np.ndarray, truth: np.ndarray, target: np.ndarray, cell: int) -> float:
    """PSNR in dB against the truth, within one latent cell on either side of the border of the mask `target`."""
    ring = ~away_from([target], cell, 1) & away_from([~target], cell, 1) ^ ~away_from([target], cell, 1)
    return psnr(picture, truth, ring)


def paste_object(before: np.ndarray, mask: np.ndarray, shift: Shift) -> np.ndarray:
    """The naive drag: the object's pixels are copied by `shift`; the object also stays where it was."""
    dx, dy = (round(part) for part in shift)
    ys, xs = np.nonzero(mask)
    inside = (ys + dy >= 0) & (ys + dy < len(before)) & (xs + dx >= 0) & (xs + dx < before.shape[1])
    copy = before.copy()
    copy[ys[inside] + dy, xs[inside] + dx] = before[ys[inside], xs[inside]]
    return copy


def background_only(scene: Scene, size: int, background: np.ndarray | None = None) -> np.ndarray:
    """The scene rendered without its objects, on `background` if one is given."""
    return render(Scene(scene.background, ()), size, background)[0]


def mean_ratio(result: DragResult, mask: np.ndarray) -> float:
    """The mean attention ratio, clamped to [0, 1], of the cells of which the true `mask` covers more than half."""
    if result.drag is not None:
        ratio = result.drag.ratios[0]
    elif result.preview is not None and result.preview.drag.objects:
        ratio = result.preview.drag.objects[0].ratio
    else:
        return math.nan
    within = torch.from_numpy(coverage(mask, *ratio.shape) > 0.5)
    return float(ratio.clamp(0, 1)[within].mean()) if bool(within.any()) else math.nan


def warped_shift(preview: DragPreview) -> Shift:
    """How far the centroid of the area that an object covers is moved by its warp."""
    points = [centroid(np.asarray(mask)) for mask in (preview.drag.mask, preview.drag.covered)]
    return points[1][0] - points[0][0], points[1][1] - points[0][1]


def _differs(picture: np.ndarray, background: np.ndarray) -> np.ndarray:
    """The mask of pixels that are visibly not background."""
    return np.sqrt(np.square(picture.astype(float) - background).mean(-1)) > VISIBLE


def centroid(mask: np.ndarray) -> tuple[float, float]:
    """The mean (x, y) of the pixels of `mask`."""
    ys, xs = np.nonzero(mask)
    return (float(xs.mean()), float(ys.mean())) if len(xs) else (math.nan, math.nan)
