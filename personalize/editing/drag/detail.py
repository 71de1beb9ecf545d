"""The fine detail of a photo that is larger than the picture in which its objects are moved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from personalize.editing.drag.pixels import NOWHERE, sampled, scaled_down
from personalize.models.image_processor import PaddedImage

MARGIN = 2  # px of the smaller picture by which a box is wider than what it holds


@dataclass(frozen=True)
class MovedLayer:
    """A warp s (H, W, 2), how much of what it shows is seen, (H, W) in [0, 1], and the map's linear scale."""

    sources: Tensor
    weight: Tensor
    scale: float


def with_detail(frame: PaddedImage, picture: Image.Image, layers: Sequence[MovedLayer]) -> Image.Image:
    """`picture`, drawn at the frame's size and scaled to the photo's, with the photo's own detail in what has moved.

        result = picture + Σ_i w_i · (D ∘ s_i)        D = photo − (photo at the frame's size, scaled back)

    Args:
        layers: the warps s_i and weights w_i of what has moved, at the frame's size.
    """
    coarse, result = np.asarray(frame.to_picture(frame.pixels)), np.array(picture)
    photo, scale = np.asarray(frame.picture), frame.picture.width / frame.size[1]
    for layer in layers:
        height, width = frame.size
        sources, weight = layer.sources[:height, :width], layer.weight[:height, :width]
        shown = (weight > 0) & (sources[..., 0] > NOWHERE / 2)
        if not bool(shown.any()):
            continue
        to = _box(shown.nonzero().flip(-1), scale, frame.picture.size)
        came = _box(sources[shown], scale, frame.picture.size)
        places = _whole(to)  # of the result's pixels, in the photo's; then in the frame's
        inside = (places + 0.5) / scale - 0.5
        at = (sampled(sources.permute(2, 0, 1), inside, "bilinear", "border").permute(1, 2, 0) + 0.5) * scale - 0.5
        corner = torch.tensor([came[0], came[1]])
        detail = torch.from_numpy(_cut(photo, came).astype(np.float32) - _cut(coarse, came)).permute(2, 0, 1)
        moved = sampled(scaled_down(detail, layer.scale), at - corner, "bicubic")
        moved = moved * sampled(weight[None], inside, "bilinear", "border")
        cut = _cut(result, to)
        cut[...] = (cut + moved.permute(1, 2, 0).numpy()).round().clip(0, 255).astype(np.uint8)
    return Image.fromarray(result)


def _box(places: Tensor, scale: float, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The box (left, top, right, bottom) in pixels of the photo around `places` (n, 2) of the frame, with a margin."""
    low, high = (
        ((places.amin(0) - MARGIN) * scale).floor().tolist(),
        ((places.amax(0) + MARGIN) * scale).ceil().tolist(),
    )
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
