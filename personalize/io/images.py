"""Read picture files, and convert between PIL images and pixel tensors (b, 3, H, W) with values in [−1, 1].

H is the height and W the width in pixels; every size is written (H, W), in the order of a tensor's dimensions.
"""

from __future__ import annotations

import math
import struct
import warnings
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from personalize.errors import UserError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
MIN_SIDE = 16  # px
MAX_PIXELS = 150_000_000  # 450 MB decoded; checked against the file's header before anything is decoded
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error)  # raised by Pillow's decoders


def load_image(path: str | Path) -> Image.Image:
    """Read a picture file of any format as an 8-bit RGB image.

    EXIF orientation is applied, transparency is composited on white, CMYK, palette and grey pictures are converted,
    16-bit values are scaled; of an animation the first frame is taken.

    Raises:
        UserError: no such file, not a picture, damaged or truncated, a side under 16 px, or over 150 million pixels.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder, expected a picture file: name the file inside it")
    if not path.exists():
        raise UserError(f"{path}: no such file; check the path of the picture")
    return read_image(path, path)


def read_image(source: Path | BinaryIO, path: Path | str) -> Image.Image:
    """Like `load_image`, from an existing file or a stream of bytes; error messages name it `path`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # _check_size has a limit of its own
            image = Image.open(source)
    except Image.DecompressionBombError:
        raise _too_large(path) from None
    except UnidentifiedImageError:
        raise UserError(f"{path} is not a picture Pillow can read: use PNG, JPEG, WebP, TIFF, GIF or BMP") from None
    except _DAMAGED as error:
        raise UserError(f"{path} cannot be opened as a picture: {_first_line(error)}") from None
    with image:
        _check_size(path, image)
        try:
            return _rgb(ImageOps.exif_transpose(image))
        except _DAMAGED as error:
            raise UserError(f"{path} is damaged or truncated: {_first_line(error)}; get a complete copy") from None


def _check_size(path: Path | str, image: Image.Image) -> None:
    """UserError for a side under MIN_SIDE or more than MAX_PIXELS."""
    if image.width * image.height > MAX_PIXELS:
        raise _too_large(path)
    if min(image.size) < MIN_SIDE:
        raise UserError(f"{path} is {image.width}×{image.height} px: each side needs at least {MIN_SIDE} px")


def _too_large(path: Path | str) -> UserError:
    return UserError(f"{path}: its header claims more than {MAX_PIXELS // 10**6} million pixels; make it smaller first")


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any Pillow mode to 8-bit RGB."""
    if image.mode.startswith("I") or image.mode == "F":
        return _from_numbers(np.asarray(image, np.float64))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _from_numbers(grey: np.ndarray) -> Image.Image:
    """Convert 16-bit, 32-bit or floating-point grey values (H, W) to an RGB image.

    White is 1 for fractional values up to 1, otherwise 65535, or the largest value if that is larger.
    """
    if not np.isfinite(grey).all():
        raise ValueError("it holds values that are no numbers")
    largest = float(grey.max(initial=0))
    white = 1.0 if largest <= 1 and not np.all(grey == np.round(grey)) else max(65535.0, largest)
    return Image.fromarray((grey.clip(0) / white * 255 + 0.5).astype(np.uint8)).convert("RGB")


def to_pixels(image: Image.Image) -> Tensor:
    """Convert a PIL image to pixels (1, 3, H, W) in [−1, 1]."""
    array = np.array(image.convert("RGB"), np.float32)
    return torch.from_numpy(array / 127.5 - 1).permute(2, 0, 1)[None].contiguous()


def to_image(pixels: Tensor) -> Image.Image:
    """Convert pixels (3, H, W) or (1, 3, H, W) to a PIL image; values outside [−1, 1] are clipped.

    Raises:
        ValueError: another shape, such as a batch of several pictures.
    """
    if pixels.ndim == 4 and len(pixels) == 1:
        pixels = pixels[0]
    if pixels.ndim != 3 or len(pixels) != 3:
        raise ValueError(f"one picture has pixels (3, H, W) or (1, 3, H, W), got {tuple(pixels.shape)}")
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
    return image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS, box=box)


def fitted_size(height: int, width: int, resolution: int, multiple: int) -> tuple[int, int]:
    """The size (H, W), both multiples of `multiple`, that is closest to a picture's aspect ratio at resolution² pixels.

    Of all sizes with an area A of ½ to 2 resolution², the one is taken that minimises

        |log (W / H) − log (width / height)| + ½ |log (A / resolution²)|

    Raises:
        UserError: `resolution` is smaller than `multiple`.
    """
    if resolution < multiple:
        raise UserError(f"resolution {resolution} px is too small: this base model needs at least {multiple} px")
    aspect, area = math.log(width / height), resolution**2
    sides = range(multiple, 8 * resolution + 1, multiple)  # aspect ratios up to 64 : 1
    sizes = [(h, w) for h in sides for w in sides if area <= 2 * h * w <= 4 * area]
    side = resolution // multiple * multiple

    def error(size: tuple[int, int]) -> float:
        h, w = size
        return abs(math.log(w / h) - aspect) + 0.5 * abs(math.log(h * w / area))

    return min(sizes or [(side, side)], key=error)


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio of two pixel tensors in [−1, 1]: 10 log₁₀(2² / mean (a − b)²) dB; ∞ if equal."""
    error = (a.double() - b.double()).pow(2).mean().item()
    return math.inf if error == 0 else 10 * math.log10(4 / error)
