"""Convert between PIL images and pixel tensors (b, 3, H, W) with values in [−1, 1], and fit them to a resolution.

H is the height and W the width in pixels; every size is written (H, W), in the order of a tensor's dimensions.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from personalize.errors import UserError
from personalize.io.image_files import as_rgb


def to_pixels(image: Image.Image) -> Tensor:
    """Convert a PIL image to pixels (1, 3, H, W) in [−1, 1]."""
    array = np.array(as_rgb(image), np.float32)
    return torch.from_numpy(array / 127.5 - 1).permute(2, 0, 1)[None].contiguous()


def to_image(pixels: Tensor) -> Image.Image:
    """Convert pixels (3, H, W) or (1, 3, H, W) to a PIL image; values outside [−1, 1] are clipped.

    Raises:
        ValueError: another shape, such as a batch of several pictures.
        UserError: values that are no numbers, which would be black.
    """
    if pixels.ndim == 4 and len(pixels) == 1:
        pixels = pixels[0]
    if pixels.ndim != 3 or len(pixels) != 3:
        raise ValueError(f"one picture has pixels (3, H, W) or (1, 3, H, W), got {tuple(pixels.shape)}")
    if not bool(pixels.isfinite().all()):
        raise UserError("the picture's values are no numbers (NaN): use smaller strengths or guidance, and not fp16")
    array = ((pixels.detach().float().cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(array.permute(1, 2, 0).numpy())


def fitted_pixels(image: Image.Image, resolution: int, multiple: int) -> tuple[Tensor, tuple[int, int]]:
    """Resize and crop a picture to about resolution² pixels, both sides multiples of `multiple`, undistorted.

    Returns:
        Pixels (1, 3, H, W) in [−1, 1], and their size (H, W), which is that of `fitted_size`.
    """
    size = fitted_size(image.height, image.width, resolution, multiple)
    return to_pixels(resize_and_crop(image, size)), size


def resize_and_crop(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resize a picture, undistorted, so that it covers `size` (H, W), and crop it equally on opposite sides."""
    height, width = size
    scale = min(image.width / width, image.height / height)  # px of the picture per px of the result
    left, top = (image.width - scale * width) / 2, (image.height - scale * height) / 2
    box = (left, top, image.width - left, image.height - top)
    return as_rgb(image).resize((width, height), Image.Resampling.LANCZOS, box=box)


def fitted_size(height: int, width: int, resolution: int, multiple: int) -> tuple[int, int]:
    """The size (H, W), both multiples of `multiple`, that is closest to a picture's aspect ratio at resolution² pixels.

    Of all sizes with an area A of ½ to 2 resolution², the one is taken that minimises

        |log (W / H) − log (width / height)| + ½ |log (A / resolution²)|

    and of two as good the larger.

    Raises:
        UserError: `resolution` is smaller than `multiple`.
    """
    if resolution < multiple:
        raise UserError(f"resolution {resolution} px is too small: this base model needs at least {multiple} px")
    aspect, area = math.log(width / height), resolution**2
    sides = range(multiple, 8 * resolution + 1, multiple)  # aspect ratios up to 64 : 1
    sizes = [(h, w) for h in sides for w in sides if area <= 2 * h * w <= 4 * area]
    side = resolution // multiple * multiple

    def error(size: tuple[int, int]) -> tuple[float, int]:
        h, w = size
        return round(abs(math.log(w / h) - aspect) + 0.5 * abs(math.log(h * w / area)), 9), -h * w

    return min(sizes or [(side, side)], key=error)


_PART = 2**22  # numbers that are compared at a time


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio of two pixel tensors in [−1, 1]: 10 log₁₀(2² / mean (a − b)²) dB; ∞ if equal."""
    parts = zip(a.flatten().split(_PART), b.flatten().split(_PART), strict=True)  # double precision takes memory
    error = sum((x.double() - y.double()).pow(2).sum().item() for x, y in parts) / a.numel()
    return math.inf if error == 0 else 10 * math.log10(4 / error)
