"""Put a photo's fine detail back into the objects that a drag has moved.

A drag moves them in a copy of the photo that is scaled down to the frame, the size the base model works at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from personalize.editing.drag.pixels import NOWHERE, sampled, scaled_down
from personalize.models.image_processor import PaddedImage

MARGIN = 2  # px of the frame by which a box is wider than what it holds


@dataclass(frozen=True)
class MovedLayer:
    """What one warp moves, on the frame.

    sources: for each pixel the (x, y) whose colour it shows, (H, W, 2), see `pixels`.  weight: the share of it that is
    seen, (H, W) in [0, 1], after the layers above it.  scale: the map's linear scale.
    """

    sources: Tensor
    weight: Tensor
    scale: float


def with_detail(frame: PaddedImage, drawn: Image.Image, layers: Sequence[MovedLayer]) -> Image.Image:
    """`drawn`, a drag's result that was scaled up from the frame, with the photo's own detail in what has moved.

        result = drawn + Σ_i w_i · (D ∘ s_i)        D = photo − (photo at the frame's size, scaled back)

    Args:
        layers: the warps s_i and weights w_i of what has moved, at the frame's size.
    """
    coarse, result, photo = (np.array(one) for one in (frame.to_picture(frame.pixels), drawn, frame.picture))
    (height, width), size = frame.size, frame.picture.size
    scale = torch.tensor([size[0] / width, size[1] / height])  # pixels of the photo for each of the frame's, as (x, y)
    for layer in layers:
        sources, weight = layer.sources[:height, :width], layer.weight[:height, :width]
        visible = (weight > 0) & (sources[..., 0] > NOWHERE / 2)
        if not bool(visible.any()):
            continue
        to, came = (_box(places, scale, size) for places in (visible.nonzero().flip(-1), sources[visible]))
        inside = (_whole(to) + 0.5) / scale - 0.5  # the result's pixels, in those of the frame
        at = (sampled(sources.permute(2, 0, 1), inside, "bilinear", "border").permute(1, 2, 0) + 0.5) * scale - 0.5
        detail = torch.from_numpy(_cut(photo, came).astype(np.float32) - _cut(coarse, came)).permute(2, 0, 1)
        moved = sampled(scaled_down(detail, layer.scale), at - torch.tensor(came[:2]), "bicubic")
        moved = moved * sampled(weight[None], inside, "bilinear", "border")
        cut = _cut(result, to)
        cut[...] = (cut + moved.permute(1, 2, 0).numpy()).round().clip(0, 255).astype(np.uint8)
    return Image.fromarray(result)


def _box(places: Tensor, scale: Tensor, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The box (left, top, right, bottom) in pixels of the photo around `places` (n, 2) of the frame, with a margin."""
    low = ((places.amin(0) - MARGIN) * scale).floor().tolist()
    high = ((places.amax(0) + MARGIN) * scale).ceil().tolist()
    left, right = (min(max(0, int(side[0])), size[0] - 1) for side in (low, high))
    top, bottom = (min(max(0, int(side[1])), size[1] - 1) for side in (low, high))
    return left, top, right + 1, bottom + 1


def _whole(box: tuple[int, int, int, int]) -> Tensor:
    """The pixels (h, w, 2) of a box, as (x, y)."""
    left, top, right, bottom = box
    rows, columns = torch.meshgrid(torch.arange(top, bottom), torch.arange(left, right), indexing="ij")
    return torch.stack([columns, rows], -1).float()


def _cut(pixels: np.ndarray, box: tuple[int, int, int, int]) -> np.ndarray:
    left, top, right, bottom = box
    return pixels[top:bottom, left:right]
