"""Read picture files of every kind as 8-bit sRGB images, by what their numbers mean, without torch."""

from __future__ import annotations

import importlib
import stat
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps, PngImagePlugin, UnidentifiedImageError

from personalize.errors import Notice, UserError, first_line
from personalize.io.image_metadata import HEIF_SUFFIXES
from personalize.io.plain_files import MAX_PICTURE_BYTES, opened

HEIF_HINT = "HEIC needs a package more: pip install 'personalize[heic]', or save it as JPEG or PNG"
MIN_SIDE = 16  # px
MAX_PIXELS = 150_000_000  # 450 MB decoded; checked against the file's header before anything is decoded
DAMAGED = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error)  # raised by Pillow's decoders
_TIFF_SIZE = (ExifTags.Base.ImageWidth, ExifTags.Base.ImageLength)  # as stored, before it is turned
_CHANNELS = {"RGB": "RGB ", "RGBX": "RGB ", "L": "GRAY", "CMYK": "CMYK"}  # mode: colour space of a profile that fits
_png_limit = threading.Lock()


class NotAnImage(UserError):
    """The file's contents are of no picture format that can be read here."""


def load_image(path: str | Path) -> Image.Image:
    """Read a picture file of any format as an 8-bit RGB image in the colours of sRGB.

    EXIF orientation and colour profile are applied, transparency is composited on white, CMYK, palette and grey
    pictures are converted, and 16-bit, 32-bit and floating-point values are scaled (see `_eight_bits`).  Of a picture
    with several frames the first is taken, with a Notice.

    Raises:
        UserError: no such file, not a picture, damaged or truncated, a side under 16 px, over 150 million pixels, or
            numbers whose range does not tell what is white.
    """
    path = check_image_path(path)
    with opened(path, MAX_PICTURE_BYTES) as stream:
        return read_image(stream, path)


def check_image_path(path: str | Path) -> Path:
    """`path`, if it is a file; UserError otherwise."""
    path = Path(path)
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: no such file; check the path of the picture") from None
    except (OSError, ValueError) as error:  # a name too long, links in a circle, a NUL
        why = getattr(error, "strerror", None) or error
        raise UserError(f"{str(path)[:200]!r}: {why}; check the path of the picture") from None
    if stat.S_ISDIR(mode):
        raise UserError(f"{path} is a folder, expected a picture file: name the file inside it")
    if not stat.S_ISREG(mode):
        raise UserError(f"{path} is a pipe or a device, expected a picture file: save the picture to a file first")
    return path


def check_image(path: str | Path) -> None:
    """UserError unless the header of the file `path` is that of a picture which `load_image` reads."""
    with header(path):
        pass


@contextmanager
def header(path: str | Path) -> Iterator[Image.Image]:
    """The picture in the file `path`, of which only the header was read, closed afterwards; UserError if it is none."""
    path = check_image_path(path)
    with opened(path, MAX_PICTURE_BYTES) as stream, _large_png_chunks(), _opened(stream, path) as image:
        _check_size(path, image)
        yield image


def image_size(path: str | Path) -> tuple[int, int]:
    """Width and height of the picture that `load_image` reads from `path`, by the file's header; UserError if none."""
    with header(path) as image:
        try:
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
        except DAMAGED:
            turned = False
        tags = getattr(image, "tag_v2", None)  # a TIFF has its size turned already; not in older Pillow
        width, height = image.size if tags is None else (tags[name] for name in _TIFF_SIZE)
        return (height, width) if turned else (width, height)


def notice_transparency(path: str | Path) -> None:
    """A Notice if the picture in the file `path` is transparent anywhere, for what is made of it is not."""
    with header(path) as image:
        if not image.has_transparency_data:
            return
    with warnings.catch_warnings(), opened(path, MAX_PICTURE_BYTES) as stream:
        warnings.simplefilter("ignore", Notice)  # of its frames, which reading it says
        with decoded(stream, path) as image:
            opaque = image.convert("RGBA").getchannel("A").getextrema()[0] == 255
    if not opaque:
        warnings.warn(
            f"{path} is transparent in places: the result is opaque, and white there unless it is edited", Notice,
            stacklevel=2,
        )  # fmt: skip


def read_image(source: Path | BinaryIO, path: Path | str) -> Image.Image:
    """Like `load_image`, from an existing file or a stream of bytes; error messages name it `path`."""
    with decoded(source, path) as image:
        return as_rgb(image, path)


@contextmanager
def decoded(source: Path | BinaryIO, path: Path | str) -> Iterator[Image.Image]:
    """The (first) picture with all its pixels, upright; what is damaged in it, also in the body, is a UserError."""
    with _large_png_chunks(), _opened(source, path) as image:
        _check_size(path, image)
        try:
            image.load()
            frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)  # MPO: one picture, and its depth
            if frames > 1:
                warnings.warn(f"{path} has {frames} frames: its first is used", Notice, stacklevel=5)
            yield _upright(image, path)
        except UserError:
            raise
        except DAMAGED as error:
            raise UserError(f"{path} is damaged or truncated: {first_line(error)}; get a complete copy") from None


@contextmanager
def _opened(source: Path | BinaryIO, path: Path | str) -> Iterator[Image.Image]:
    """The picture with its header read, closed afterwards."""
    register_heif()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # _check_size has a limit of its own
            image = Image.open(source)
    except Image.DecompressionBombError:
        raise _too_large(path) from None
    except UnidentifiedImageError:
        raise NotAnImage(f"{path} is not a picture Pillow can read: {_hint(path)}") from None
    except DAMAGED as error:
        raise UserError(f"{path} cannot be opened as a picture: {first_line(error)}") from None
    with image:
        yield image


def _hint(path: Path | str) -> str:
    """What to do about a file that is no picture."""
    if str(path).lower().endswith(HEIF_SUFFIXES) and not register_heif():
        return HEIF_HINT
    return "use PNG, JPEG, WebP, AVIF, TIFF, GIF or BMP"


def register_heif() -> bool:
    """Make Pillow read HEIC if the package pillow-heif is installed; False if it is not."""
    if find_spec("pillow_heif") is None:
        return False
    if "HEIF" not in Image.OPEN:
        importlib.import_module("pillow_heif").register_heif_opener()
    return True


@contextmanager
def _large_png_chunks() -> Iterator[None]:
    """Let Pillow read PNG profiles and texts of up to 64 MB, its limit for all texts of a file, not of 1 MB each."""
    with _png_limit:
        limit = PngImagePlugin.MAX_TEXT_CHUNK
        PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY
        try:
            yield
        finally:
            PngImagePlugin.MAX_TEXT_CHUNK = limit


def _check_size(path: Path | str, image: Image.Image) -> None:
    """UserError for a side under MIN_SIDE or more than MAX_PIXELS."""
    if image.width * image.height > MAX_PIXELS:
        raise _too_large(path)
    if min(image.size) < MIN_SIDE:
        raise UserError(f"{path} is {image.width}×{image.height} px: each side needs at least {MIN_SIDE} px")


def _too_large(path: Path | str) -> UserError:
    return UserError(f"{path}: its header claims more than {MAX_PIXELS // 10**6} million pixels; make it smaller first")


def _upright(image: Image.Image, path: Path | str) -> Image.Image:
    """The decoded picture turned as its EXIF says; as it is, with a Notice, if the EXIF cannot be read."""
    try:
        return ImageOps.exif_transpose(image)
    except DAMAGED as error:
        warnings.warn(
            f"{path}: its EXIF data cannot be read ({first_line(error)}), so it is not turned", Notice, stacklevel=2
        )
        return image


def as_rgb(image: Image.Image, path: Path | str = "the picture", background: str = "white") -> Image.Image:
    """An opened picture of any Pillow mode in 8-bit RGB, the colours of sRGB, transparency over the `background`.

    It is what `load_image` reads, except that EXIF does not turn it: points and masks fit the picture as it is.
    """
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I") or image.mode == "F":
        hidden, values = image.info.get("transparency"), np.asarray(image)
        image = _eight_bits(image, path)
        if isinstance(hidden, int):  # the value of a PNG's transparent pixels
            image.putalpha(Image.fromarray(np.where(values == hidden, 0, 255).astype(np.uint8)))
    if image.has_transparency_data:
        colours = "L" if image.mode in ("L", "LA", "La") else "RGB"  # a profile of greys is for one channel
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
        if alpha.getextrema()[1] == 0:
            raise UserError(f"{path} is transparent everywhere, so that nothing of it is seen: save it opaque")
        image = _to_srgb(image.convert(colours), profile, path)
        return Image.composite(image, Image.new("RGB", image.size, background), alpha)
    image = _to_srgb(image if image.mode in _CHANNELS else image.convert("RGB"), profile, path)
    image.info.pop("icc_profile", None)  # it counts no more
    return image


def _to_srgb(image: Image.Image, profile: bytes | None, path: Path | str) -> Image.Image:
    """`image`, whose mode is a key of `_CHANNELS`, in RGB, converted from its colour `profile` to sRGB.

    As in viewers, a profile for other channels than the image has, and one that is damaged, counts as sRGB; the latter
    with a Notice.
    """
    if not profile:
        return image.convert("RGB")
    try:
        source: Any = ImageCms.ImageCmsProfile(BytesIO(profile))
        own = "sRGB" in ImageCms.getProfileDescription(source)
        if own or source.profile.xcolor_space != _CHANNELS[image.mode]:
            return image.convert("RGB")
        result = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
        assert result is not None, "profileToProfile returns None only in place"
        return result
    except (ImageCms.PyCMSError, OSError) as error:
        warnings.warn(
            f"{path}: its colour profile cannot be used ({first_line(error)}), so its colours are taken as sRGB",
            Notice, stacklevel=2,
        )  # fmt: skip
        return image.convert("RGB")


def _eight_bits(image: Image.Image, path: Path | str) -> Image.Image:
    """Convert 16-bit, 32-bit or floating-point grey values to an image of mode "L".

    White is 65535 for 16 bits.  For 32-bit integers it is the first of 255 and 65535 that no value exceeds, and for
    floating-point numbers the first of 1, 255 and 65535 that none exceeds by more than a tenth, which resampling may
    cause.

    Raises:
        UserError: values that are no numbers, negative ones, or a range between these or above them.
    """
    grey = np.asarray(image, np.float64)
    if not np.isfinite(grey).all():
        raise UserError(f"{path} holds values that are no numbers (NaN or infinity): save it again as 8- or 16-bit")
    low, high = float(grey.min()), float(grey.max())
    integers = image.mode != "F"
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        white = 65535.0
    else:
        slack = 1.0 if integers else 1.1
        whites = [255.0, 65535.0] if integers else [1.0, 255.0, 65535.0]
        white = next((white for white in whites if high <= white * slack), 0.0)
        ambiguous = not integers and white == 255 and high < 16  # more than 1, yet nearly black out of 255
        if white == 0 or ambiguous or low < white * (1 - slack):
            expected = "0 to 255 or 65535" if integers else "0 to 1, 255 or 65535"
            raise UserError(f"{path} has values from {low:g} to {high:g}, expected {expected}: save it as 8- or 16-bit")
    return Image.fromarray((grey.clip(0, white) / white * 255 + 0.5).astype(np.uint8))
