"""Read mask files of every kind as images of mode "L", by what their pixels mean, without torch.

Of a cut-out with transparency around it the alpha channel is the mask.  Otherwise white chooses and black does not,
with soft greys between.  A coloured picture without transparency, such as a photo of the thing on black, is refused:
dark parts of the thing would count as black.  Paint in one colour is no such picture, and counts by its brightness; a
photo of greys, or of greys and shades of one colour, cannot be told from a soft mask and is taken as one.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from personalize.errors import Notice, UserError
from personalize.io.image_files import as_rgb, check_image_path, decoded
from personalize.io.plain_files import MAX_PICTURE_BYTES, opened

Box = tuple[float, float, float, float]  # left, top, right, bottom
HALF_WHITE = 128  # from this value on a pixel of a mask chooses
NEAR = 8  # of 255: how far black and white may be from their values, as compression leaves them
CHROMA = 32  # from this difference between the largest and the smallest channel on a pixel is coloured
SAMPLE = 2**20  # pixels of which colours are counted
APART = 32  # of 255: from this difference in brightness on flat colours around HALF_WHITE are a dark and a bright one
SCATTER = 6  # of 255: median distance of colours from one line; paint with soft edges, as JPEG, has at most 5


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

    Where the most opaque pixels are black and white, transparency is composited on black: what a cut-out leaves out is
    not chosen.  Where they have one colour, or are a picture, the alpha channel itself is the mask.

    Raises:
        UserError: a coloured picture without transparency.
    """
    if not image.has_transparency_data:
        return image if image.mode == "L" else _grey(as_rgb(image, name), name)
    colours = image.convert("RGBA")
    alpha = colours.getchannel("A")
    levels = [value for value, count in enumerate(alpha.histogram()) if count]
    if levels == [0]:
        return alpha  # black: nothing of it is seen
    opaque = alpha.point([255 * (value == levels[-1]) for value in range(256)])
    plain = len(list(filter(None, colours.convert("RGB").histogram(opaque)))) == 3  # one value in each channel
    if len(levels) > 1 and (plain or not _black_and_white(colours.convert("RGB"), opaque)):
        return alpha
    return _grey(as_rgb(image, name, "black"), name)


def _black_and_white(picture: Image.Image, seen: Image.Image) -> bool:
    """Are most of the pixels of this RGB `picture` where `seen` is white black or white?"""
    pixels = np.asarray(picture)[np.asarray(seen) > 0]
    black, white = (pixels <= NEAR).all(1), (pixels >= 255 - NEAR).all(1)
    return 2 * int((black | white).sum()) > len(pixels)


def _grey(picture: Image.Image, name: Path | str) -> Image.Image:
    """An opaque picture in RGB in mode "L"; UserError if its colours are those of a picture of a thing."""
    if _shows_colours(np.asarray(picture).reshape(-1, 3)):
        raise UserError(
            f"{name} is a coloured picture, of which dark parts would count as black: bring one that is white (255) "
            "where it chooses and black elsewhere, or a cut-out whose background is transparent"
        )
    return picture.convert("L")


def _shows_colours(pixels: np.ndarray) -> bool:
    """Are the coloured ones of these pixels (n, 3) many, and scattered, or of flat colours both dark and bright?

    The colours of one paint lie on a line: soft edges mix it with black or white.
    """
    pixels = pixels[:: 1 + len(pixels) // SAMPLE]
    seen = int((pixels.max(1) > NEAR).sum())
    coloured = pixels[np.ptp(pixels, 1) > CHROMA]
    if len(coloured) < max(2, 0.01 * seen):
        return False
    shades, counts = np.unique(coloured // 16, axis=0, return_counts=True)
    flat = (shades[counts >= 0.1 * len(coloured)] * 16.0 + 8) @ (0.299, 0.587, 0.114)  # brightness
    if len(flat) and flat.min() < HALF_WHITE <= flat.max() and flat.max() - flat.min() > APART:
        return True
    centred = coloured - np.median(coloured, 0)
    axis = np.linalg.eigh(centred.T @ centred)[1][:, -1]
    return float(np.median(np.linalg.norm(centred - np.outer(centred @ axis, axis), axis=1))) > SCATTER


def check_mask_size(mask: tuple[int, int], picture: tuple[int, int]) -> None:
    """UserError unless a mask has the size of its picture; both are (width, height) in pixels."""
    if mask != picture:
        raise UserError(
            f"the mask is {mask[0]}×{mask[1]} px, the picture {picture[0]}×{picture[1]}: give a mask of the picture's "
            "size"
        )


def check_box(box: Box, picture: tuple[int, int]) -> None:
    """UserError unless a box in pixels lies in a picture of that size, (width, height)."""
    left, top, right, bottom = box
    width, height = picture
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        sides = ",".join(f"{side:g}" for side in box)
        raise UserError(f"the box {sides} does not lie in the picture of {width}×{height} px: left,top,right,bottom")


def check_mask(mask: Image.Image, name: Path | str = "the mask") -> None:
    """UserError, which calls the mask `name`, if no pixel of this image of mode "L" is nearer to white than to black.

    So are masks of class numbers (0 and 1), and what was painted in red or blue: they would choose nothing, or next to
    nothing.
    """
    most = int(mask.getextrema()[1])  # pyright: ignore[reportArgumentType]
    if most < HALF_WHITE:
        what = f"has no value above {most} of 255" if most else "is black everywhere"
        raise UserError(f"{name} {what}, so that it chooses nothing: paint white (255) what it is to choose")
