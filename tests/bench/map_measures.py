"""Noun maps and backgrounds against the true masks of a scene."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from personalize.editing.dynamic_prompt_learning.fit import disjoint_loss
from tests.bench.picture_measures import iou

THETAS = [round(0.05 * step, 2) for step in range(1, 20)]


def map_measures(maps: Tensor, masks: Sequence[np.ndarray]) -> dict[str, Any]:
    """How well noun maps (k, h, w) locate their objects, whose true masks are `masks` (H, W).

    iou, best: mean IoU of the maps cut at θ = 0.3 of their maximum, and at the best θ.
    overlap: of the maps with one another.  off: the share of a map's mass outside its object.
    """
    large = interpolate(maps[None].float(), masks[0].shape, mode="bilinear", align_corners=False)[0].numpy()
    curve = [float(np.mean([iou(m / m.max() > theta, mask) for m, mask in zip(large, masks, strict=True)]))
             for theta in THETAS]  # fmt: skip
    off = [float(m[~mask].sum() / m.sum()) for m, mask in zip(large, masks, strict=True)]
    return {"iou": curve[THETAS.index(0.3)], "best": max(curve), "overlap": float(disjoint_loss(maps)),
            "off": float(np.mean(off))}  # fmt: skip


def background_iou(background: Tensor | None, masks: Sequence[np.ndarray]) -> float:
    """IoU of the estimated background (h, w) with the cells of which objects cover less than half; 0 for None."""
    if background is None:
        return 0.0
    things = torch.from_numpy(np.any(masks, axis=0))[None, None].float()
    share = interpolate(things, background.shape[-2:], mode="area")[0, 0]
    return iou(background.numpy(), (share < 0.5).numpy())
