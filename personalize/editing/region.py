"""Where a photo may change: a region given by the user, kept at every step and in the photo's own pixels.

While sampling, cells outside the region are those of the source row (`PinnedOutside`). In the result, pixels outside
are the photo's own, in the photo's own resolution; inside, the edit fades in over about one latent cell.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageChops, ImageFilter
from torch import Tensor
from torch.nn.functional import max_pool2d

from personalize.errors import UserError
from personalize.io.images import to_pixels
from personalize.io.mask_files import HALF_WHITE, Box, check_box
from personalize.models.image_processor import PaddedImage, Picture, as_mask_image
from personalize.models.transfer import sent
from personalize.sampling.denoise import LatentEdit
from personalize.sampling.schedule import Step


@dataclass(frozen=True)
class EditRegion:
    """The region of a photo that may change.

    picture: of the photo's size, mode L: 255 where a pixel may change, else 0.
    cells: boolean (h, w), the latent cells that contain such a pixel.
    """

    picture: Image.Image
    cells: Tensor

    @staticmethod
    def of(frame: PaddedImage, mask: Picture | Box) -> EditRegion:
        """The region of a picture (white where the photo may change) or box (left, top, right, bottom) in pixels.

        Raises UserError if the picture has another size than the photo, the box lies outside it, or the region is so
        small or thin that `keep_photo` would leave nothing of an edit.
        """
        white = np.asarray(mask_picture(frame, mask).convert("L")) >= HALF_WHITE
        picture = Image.fromarray(white.astype(np.uint8) * 255)
        frame.check_mask_size(picture)
        width = _fading_width(frame)
        if feathered(picture, width).getbbox() is None:
            left, top, right, bottom = picture.getbbox() or (0, 0, 0, 0)
            raise UserError(
                f"the region that may change, {right - left}×{bottom - top} px, is too small or thin to show an edit, "
                f"which fades in over about {width:.3g} px from its border: make it larger (a box is in pixels)"
            )
        return EditRegion(picture, _touched_cells(frame, picture))

    def __and__(self, other: EditRegion) -> EditRegion:
        """What two regions of one photo have in common."""
        return EditRegion(ImageChops.darker(self.picture, other.picture), self.cells & other.cells)

    @staticmethod
    def of_cells(frame: PaddedImage, cells: Tensor) -> EditRegion:
        """The region that latent cells, boolean (h, w), cover."""
        return EditRegion(frame.mask_to_picture(cells), cells)


class PinnedOutside(LatentEdit):
    """Outside `cells`, boolean (h, w), rows 1 … take the latents of row 0 after every step."""

    def __init__(self, cells: Tensor) -> None:
        self.cells = cells

    def latents(self, z: Tensor, step: Step) -> Tensor:
        self.cells = sent(self.cells, z.device)
        return torch.where(self.cells, z, z[:1])


def keep_photo(edited: Image.Image, frame: PaddedImage, region: EditRegion) -> tuple[Image.Image, int]:
    """The edit inside the region and the photo's own pixels outside, and how many pixels are the photo's own.

    Inside, the edit fades in from the border over about one latent cell, measured in the photo's pixels.
    """
    alpha = feathered(region.picture, _fading_width(frame))
    return Image.composite(edited, frame.picture, alpha), int((np.asarray(alpha) == 0).sum())


def _fading_width(frame: PaddedImage) -> float:
    """The width of a latent cell in pixels of the photo."""
    return frame.factor * frame.picture.width / frame.size[1]


def feathered(region: Image.Image, width: float) -> Image.Image:
    """`region` (mode L, 0 or 255) with a soft border inside it: 0 outside and at the border, 255 from `width` px on."""
    soft = np.asarray(region.filter(ImageFilter.GaussianBlur(width / 2)), np.int16)
    return Image.fromarray(np.where(np.asarray(region) > 0, (2 * soft - 255).clip(0, 255), 0).astype(np.uint8))


def mask_picture(frame: PaddedImage, mask: Picture | Box) -> Image.Image:
    """A mask as a picture: a box (left, top, right, bottom) is white on black. UserError for a box outside."""
    if not isinstance(mask, tuple):
        return as_mask_image(mask)
    check_box(mask, frame.picture.size)
    picture = Image.new("L", frame.picture.size)
    picture.paste(255, tuple(round(side) for side in mask))  # pyright: ignore[reportArgumentType]
    return picture


def _touched_cells(frame: PaddedImage, picture: Image.Image) -> Tensor:
    """The latent cells, boolean (h, w), with a pixel of the region, at the size at which the photo is edited."""
    height, width = frame.size
    scaled = to_pixels(picture.resize((width, height), Image.Resampling.BOX))[:, :1] > -1  # white: 1, black: −1
    full = torch.zeros(1, 1, *frame.pixels.shape[-2:])
    full[..., :height, :width] = scaled
    return max_pool2d(full, frame.factor)[0, 0] > 0
