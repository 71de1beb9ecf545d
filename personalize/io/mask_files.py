"""Read mask files of every kind as images of mode "L", by what their pixels mean, without torch."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from personalize.errors import Notice, UserError
from personalize.io.image_files import as_rgb, check_image_path, decoded
from personalize.io.plain_files import MAX_PICTURE_BYTES, opened

HALF_WHITE = 128  # from this value on a pixel of a mask chooses


def load_mask(path: str | Path) -> Image.Image:
    """Read a mask file of any format that `load_image` reads, as an image of mode "L": white where it chooses.

    A mask that is white everywhere is a Notice; see `as_mask` for transparency.

    Raises:
        UserError: as `load_image`, or nothing in the mask is white (see `check_mask`).
    """
    path = check_image_path(path)
    with opened(path, MAX_PICTURE_BYTES) as stream:
        return read_mask(stream, path)


def read_mask(source: Path | BinaryIO, path: Path | str) -> Image.Image:
    """Like `load_mask`, from an existing file or a stream of bytes; messages name it `path`."""
    with decoded(source, path) as image:
        mask = as_mask(image, path)
    check_mask(mask, path)
    if mask.getextrema()[0] == 255:
        warnings.warn(
            f"{path} is white everywhere, so that it chooses the whole picture: paint black elsewhere, or leave it out",
            Notice, stacklevel=3,
        )  # fmt: skip
    return mask


def as_mask(image: Image.Image, name: Path | str = "the mask") -> Image.Image:
    """An opened picture of any mode as a mask of mode "L"; messages call it `name`.

    Transparency is composited on black: what a cut-out leaves out is not chosen.  Where all of the most opaque pixels
    have one colour, which then says nothing, the alpha channel itself is the mask.
    """
    if not image.has_transparency_data:
        return image if image.mode == "L" else as_rgb(image, name).convert("L")
    colours = image.convert("RGBA")
    alpha = colours.getchannel("A")
    levels = [value for value, count in enumerate(alpha.histogram()) if count]
    if levels == [0]:
        return alpha  # black: nothing of it is seen
    opaque = alpha.point([255 * (value == levels[-1]) for value in range(256)])
    plain = len(list(filter(None, colours.convert("RGB").histogram(opaque)))) == 3  # one value in each channel
    return alpha if plain and len(levels) > 1 else as_rgb(image, name, "black").convert("L")


def check_mask(mask: Image.Image, name: Path | str = "the mask") -> None:
    """UserError, which calls the mask `name`, if no pixel of this image of mode "L" is nearer to white than to black.

    So are masks of class numbers (0 and 1), and what was painted in red or blue: they would choose nothing, or next to
    nothing.
    """
    most = int(mask.getextrema()[1])  # pyright: ignore[reportArgumentType]
    if most < HALF_WHITE:
        what = f"has no value above {most} of 255" if most else "is black everywhere"
        raise UserError(f"{name} {what}, so that it chooses nothing: paint white (255) what it is to choose")
