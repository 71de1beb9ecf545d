"""Pictures of any size as input of the model: scaled down and padded, with points and masks mapped both ways."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d

from personalize.io.image_files import as_rgb, load_image
from personalize.io.images import to_image, to_pixels
from personalize.io.mask_files import as_mask, check_mask, check_mask_size, load_mask
from personalize.models.blocks import block_roles
from personalize.models.stable_diffusion import StableDiffusion

Point = tuple[float, float]
Picture = Image.Image | str | Path
NEAR = 0.05


def as_image(picture: Picture) -> Image.Image:
    """A picture, or the one in the file of that path, in RGB, see `as_rgb`."""
    return as_rgb(picture) if isinstance(picture, Image.Image) else load_image(picture)


def as_mask_image(mask: Picture) -> Image.Image:
    """A mask, or the one in the file of that path, in mode "L": white where it chooses, see `as_mask`, `check_mask`."""
    if not isinstance(mask, Image.Image):
        return load_mask(mask)
    check_mask(grey := as_mask(mask))
    return grey


@dataclass(frozen=True)
class PaddedImage:
    """A picture scaled to `size` (H, W), then reflected at the bottom and right up to sides that the UNet can halve.

    Attributes:
        picture: the original, in its own size.
        pixels: the scaled and padded picture (1, 3, H′, W′) in [−1, 1].
        factor: pixels per latent cell.
    """

    picture: Image.Image
    size: tuple[int, int]
    pixels: Tensor
    factor: int

    @staticmethod
    def of(
        model: StableDiffusion, picture: Image.Image, resolution: int | None = None, *, enlarge: bool = False
    ) -> PaddedImage:  # fmt: skip
        """Pad `picture`, scaled down if it has more than resolution² pixels (by default the base's resolution).

        enlarge: also scale smaller pictures up to about that: the base was trained at its own size, and draws smears
            on a few latent cells. A picture whose sides lack less than the share `NEAR` keeps its size, because
            resampling would blur it for nothing.
        """
        picture = as_rgb(picture)
        scale = (resolution or model.resolution) / math.sqrt(picture.width * picture.height)
        if 1 < scale < 1 + NEAR or (scale > 1 and not enlarge):
            scale = 1.0
        height, width = (max(1, round(length * scale)) for length in (picture.height, picture.width))
        scaled = picture if scale == 1 else picture.resize((width, height), Image.Resampling.LANCZOS)
        multiple = model.factor * 2 ** max(role.level for role in block_roles(model.unet).values())
        return PaddedImage(picture, (height, width), _padded(to_pixels(scaled), multiple), model.factor)

    def to_cells(self, point: Point) -> Point:
        """Convert (x, y) in pixels of the original to latent cells."""
        x, y = self.to_scaled(point)
        return x / self.factor, y / self.factor

    def to_point(self, cells: Point) -> Point:
        """Convert (x, y) in latent cells to pixels of the original."""
        return self.from_scaled((cells[0] * self.factor, cells[1] * self.factor))

    def to_scaled(self, point: Point) -> Point:
        """Convert (x, y) in pixels of the original to pixels of the scaled picture."""
        across, down = self._scales
        return point[0] * across, point[1] * down

    def from_scaled(self, point: Point) -> Point:
        """Convert (x, y) in pixels of the scaled picture to pixels of the original."""
        across, down = self._scales
        return point[0] / across, point[1] / down

    def check_mask_size(self, mask: Image.Image) -> None:
        """UserError if `mask` has another size than the original."""
        check_mask_size(mask.size, self.picture.size)

    def mask_to_cells(self, mask: Image.Image) -> Tensor:
        """The latent cells (h, w), boolean, of which at least half is white in a mask of the original's size.

        Raises:
            UserError: the mask has another size than the picture.
        """
        self.check_mask_size(mask)
        height, width = self.size
        grey = np.asarray(mask.convert("L").resize((width, height), Image.Resampling.BOX), np.float32) / 255
        full = np.zeros(self.pixels.shape[-2:], np.float32)
        full[:height, :width] = grey
        return avg_pool2d(torch.from_numpy(full)[None, None], self.factor)[0, 0] >= 0.5

    def mask_to_picture(self, mask: Tensor, size: tuple[int, int] | None = None) -> Image.Image:
        """A boolean mask (h, w) of latent cells as a picture, white where True; `size` is by default the original's."""
        whole = np.kron(mask.numpy().astype(np.uint8) * 255, np.ones((self.factor, self.factor), np.uint8))
        height, width = self.size
        return Image.fromarray(whole[:height, :width]).resize(size or self.picture.size, Image.Resampling.NEAREST)

    def to_picture(self, pixels: Tensor) -> Image.Image:
        """Pixels (1, 3, H′, W′) without the padding, as a picture of the original's size."""
        height, width = self.size
        image = to_image(pixels[..., :height, :width])
        same = image.size == self.picture.size
        return image if same else image.resize(self.picture.size, Image.Resampling.LANCZOS)

    @property
    def visible(self) -> Tensor:
        """The latent cells (h, w), boolean, that show some of the picture and not padding alone."""
        height, width = (length // self.factor for length in self.pixels.shape[-2:])
        rows, columns = (torch.arange(side) * self.factor for side in (height, width))
        return (rows < self.size[0])[:, None] & (columns < self.size[1])

    @property
    def _scales(self) -> tuple[float, float]:
        return self.size[1] / self.picture.width, self.size[0] / self.picture.height


def _padded(pixels: Tensor, multiple: int) -> Tensor:
    """`pixels` (1, 3, H, W) padded by reflection at the bottom and right to sides that are multiples of `multiple`."""
    height, width = pixels.shape[-2:]
    extra = ((0, 0), (0, 0), (0, -height % multiple), (0, -width % multiple))
    mode = "reflect" if min(height, width) > 1 else "edge"
    return torch.from_numpy(np.pad(pixels.numpy(), extra, mode))
