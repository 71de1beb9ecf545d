"""Pictures of different aspect ratios as training pictures: each in the size (bucket) that is nearest to its own shape.

The sides of a bucket are multiples of what the base model can halve (64 px on released bases).  A picture that has not
quite its bucket's shape is shown whole: it is scaled down and padded by reflection at the bottom or at the right, and
the loss does not count there.  Only with a mask, which says where the subject is, it is cut instead, if the cut leaves
all of the subject.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from personalize.io.image_files import as_rgb
from personalize.io.images import fitted_size, to_pixels

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class FittedImage:
    """A training picture in the size of its bucket.

    Attributes:
        pixels: (1, 3, H, W) in [−1, 1].
        mask: (1, 1, H, W) in [0, 1], 1 where the subject is; None if not given.
        unpadded: height and width of the part that is no padding; None: there is no padding.
        original: height and width of the picture file.
        corner: top and left of the part that is shown, in pixels of the scaled picture, mirrored if `pixels` are.
        cut: what is missing of the picture, in words; empty if it is whole.
        box: the part of the picture file that is shown, in its pixels: left, top, right, bottom; None: all of it.
        mirrored: `pixels` are mirrored; `mask`, `unpadded` and `box` are not.
    """

    pixels: Tensor
    mask: Tensor | None = None
    unpadded: tuple[int, int] | None = None
    original: tuple[int, int] | None = None
    corner: tuple[int, int] = (0, 0)
    cut: str = ""
    mirrored: bool = False
    box: Box | None = None

    def mirror(self) -> FittedImage:
        """The picture mirrored from left to right."""
        return replace(self, pixels=self.pixels.flip(-1), mirrored=not self.mirrored, corner=self.mirrored_corner)

    @property
    def mirrored_corner(self) -> tuple[int, int]:
        """`corner` in the mirrored picture, where what was cut off at the right is at the left."""
        if self.box is None or self.original is None:
            return self.corner
        scale = self.size[0] / (self.box[3] - self.box[1])
        return self.corner[0], max(0, round(self.original[1] * scale) - self.size[1] - self.corner[1])

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the bucket."""
        return self.pixels.shape[-2], self.pixels.shape[-1]

    @property
    def unpadded_size(self) -> tuple[int, int]:
        """Height and width of the picture in the bucket, without the padding."""
        return self.unpadded or self.size

    def own_part(self, pixels: Tensor) -> Tensor:
        """The part of `pixels` (…, H, W) where this picture is, without the padding."""
        height, width = self.unpadded_size
        return pixels[..., :height, :width]

    @property
    def time_ids(self) -> tuple[int, ...]:
        """SDXL's micro-conditioning: original size, crop corner, and size, each as (height, width)."""
        return (*(self.original or self.size), *self.corner, *self.size)

    @property
    def padding(self) -> str:
        """What is padded, in words; empty if nothing is."""
        (height, width), (h, w) = self.size, self.unpadded_size
        parts = [f"{height - h} px at the bottom"] * (h < height) + [f"{width - w} px at the right"] * (w < width)
        return f"padded by {' and '.join(parts)}" if parts else ""

    def weights(self, mask_weight: float) -> Tensor | None:
        """Weight of the loss by pixel, (1, 1, H, W): 0 in the padding, 1 − `mask_weight` outside the mask; None: 1."""
        if self.mask is None and self.unpadded_size == self.size:
            return None
        weights = torch.ones(1, 1, *self.size) if self.mask is None else 1 - mask_weight * (1 - self.mask.float())
        height, width = self.unpadded_size
        weights[..., height:, :] = 0
        weights[..., width:] = 0
        return weights.flip(-1) if self.mirrored else weights


def fit(image: Image.Image, mask: Image.Image | None, resolution: int, multiple: int) -> FittedImage:
    """A picture in its bucket of about `resolution`² pixels, with sides that are multiples of `multiple`.

    Raises:
        UserError: `resolution` is smaller than `multiple`.
    """
    return fit_into(fitted_size(image.height, image.width, resolution, multiple), image, mask)


def fit_into(size: tuple[int, int], image: Image.Image, mask: Image.Image | None = None) -> FittedImage:
    """A picture in a bucket of (H, W) = `size`, which may have another shape than the picture."""
    box = None if mask is None else _window(image.size, size, mask.convert("L").getbbox())
    if box is not None:
        return _cropped(image, mask, size, box)
    return _padded(image, mask, size)


def as_fitted(pixels: Tensor | Sequence[FittedImage], masks: Tensor | None = None) -> list[FittedImage]:
    """Pictures given as pixels (p, 3, H, W), with masks (p, 1, H, W) or none, as fitted ones; these as they are."""
    if not isinstance(pixels, Tensor):
        return list(pixels)
    return [FittedImage(row[None], None if masks is None else masks[i : i + 1]) for i, row in enumerate(pixels)]


def _window(picture: tuple[int, int], size: tuple[int, int], subject: tuple[int, int, int, int] | None) -> Box | None:
    """The largest part (left, top, right, bottom) of the picture (W, H) in the shape of `size` that holds `subject`.

    None if no such part holds it, or there is no subject.
    """
    if subject is None:
        return None
    (width, height), (h, w) = picture, size
    scale = min(width / w, height / h)
    left, top = (
        _offset(side, length * scale, subject[axis], subject[axis + 2])
        for axis, (side, length) in enumerate(((width, w), (height, h)))
    )
    return None if left is None or top is None else (left, top, left + w * scale, top + h * scale)


def _offset(side: float, window: float, low: float, high: float) -> float | None:
    """Where a window in [0, side] starts that holds [low, high], as near to the middle as possible; None if none."""
    if high - low > window + 1e-6:
        return None
    return min(max((side - window) / 2, high - window, 0.0), low)


def _cropped(image: Image.Image, mask: Image.Image | None, size: tuple[int, int], box: Box) -> FittedImage:
    scale = size[0] / (box[3] - box[1])
    sides = (
        (box[0] / image.width, "left"), (1 - box[2] / image.width, "right"),
        (box[1] / image.height, "top"), (1 - box[3] / image.height, "bottom"),
    )  # fmt: skip
    cut = " and ".join(f"{share:.1%} at the {side}" for share, side in sides if share > 1e-6)
    corner = (round(box[1] * scale), round(box[0] * scale))
    return FittedImage(
        to_pixels(_resized(image, size, box)), _mask_pixels(mask, size, box), size, (image.height, image.width), corner,
        f"cut by {cut}, where no mask is" if cut else "", box=box,
    )  # fmt: skip


def _padded(image: Image.Image, mask: Image.Image | None, size: tuple[int, int]) -> FittedImage:
    scale = min(size[0] / image.height, size[1] / image.width)
    unpadded = (min(size[0], max(1, round(image.height * scale))), min(size[1], max(1, round(image.width * scale))))
    box = (0.0, 0.0, float(image.width), float(image.height))
    pixels, white = to_pixels(_resized(image, unpadded, box)), _mask_pixels(mask, unpadded, box)
    white = None if white is None else padded(white, size, mask=True)
    return FittedImage(padded(pixels, size), white, unpadded, (image.height, image.width))


def padded(pixels: Tensor, size: tuple[int, int], *, mask: bool = False) -> Tensor:
    """`pixels` (…, h, w) padded at the bottom and at the right to (H, W) = `size`: by reflection, a mask by zeros."""
    (h, w), (height, width) = pixels.shape[-2:], size
    if (h, w) == size:
        return pixels
    extra = (*[(0, 0)] * (pixels.ndim - 2), (0, height - h), (0, width - w))
    mode = "constant" if mask else "reflect" if min(h, w) > 1 else "edge"
    return torch.from_numpy(np.pad(pixels.numpy(), extra, mode))


def _resized(image: Image.Image, size: tuple[int, int], box: Box) -> Image.Image:
    return as_rgb(image).resize((size[1], size[0]), Image.Resampling.LANCZOS, box=box)


def _mask_pixels(mask: Image.Image | None, size: tuple[int, int], box: Box) -> Tensor | None:
    """The part `box` of a mask as (1, 1, H, W) in [0, 1]."""
    return None if mask is None else (to_pixels(_resized(mask, size, box))[:, :1] + 1) / 2
