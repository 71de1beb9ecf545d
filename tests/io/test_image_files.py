"""Reading picture files of every kind: their pixels by what they mean, and messages for what cannot be read."""

from __future__ import annotations

import math
import os
import re
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from personalize.errors import Notice, UserError
from personalize.io.image_files import MIN_SIDE, NotAnImage, as_rgb, check_image, load_image, notice_transparency
from personalize.io.images import psnr, to_pixels
from tests.support.picture_files import gradient, saved


def png_header(width: int, height: int) -> bytes:
    """A well-formed PNG that claims to be `width`×`height` and holds next to nothing."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, turn: int) -> None:
    upright = gradient()
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Image.Transpose that stores what EXIF `turn` says
    stored = upright.transpose(Image.Transpose(undo[turn])) if turn > 1 else upright
    exif = Image.Exif()
    exif[274] = turn
    loaded = load_image(saved(stored, tmp_path / "a.png", exif=exif))
    assert loaded.size == upright.size
    assert psnr(to_pixels(loaded), to_pixels(upright)) == math.inf


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_a_picture_of_which_nothing_is_seen_is_refused(tmp_path: Path, mode: str) -> None:
    hidden = gradient().convert(mode)
    hidden.putalpha(0)
    for read in (lambda: load_image(saved(hidden, tmp_path / "a.png")), lambda: as_rgb(hidden)):
        with pytest.raises(UserError, match="is transparent everywhere, so that nothing of it is seen"):
            read()


def test_alpha_is_composited_on_white(tmp_path: Path) -> None:
    image = gradient().convert("RGBA")
    image.putalpha(0)
    image.putpixel((10, 10), (1, 2, 3, 255))
    for name in ("a.png", "a.webp"):
        assert load_image(saved(image, tmp_path / name)).getpixel((3, 3)) == (255, 255, 255)
    grey = Image.merge("LA", [Image.new("L", (20, 20), 0), Image.new("L", (20, 20), 128)])
    assert load_image(saved(grey, tmp_path / "la.png")).getpixel((3, 3)) == (127, 127, 127)


def test_palette_with_and_without_transparency(tmp_path: Path) -> None:
    palette = Image.new("RGB", (20, 20), (10, 200, 30))
    palette.putpixel((10, 10), (200, 10, 30))
    palette = palette.quantize(4)
    assert load_image(saved(palette, tmp_path / "p.png")).getpixel((1, 1)) == (10, 200, 30)
    clear = saved(palette, tmp_path / "clear.gif", transparency=palette.getpixel((1, 1)))
    assert load_image(clear).getpixel((1, 1)) == (255, 255, 255)


def test_cmyk_and_grey(tmp_path: Path) -> None:
    cmyk = Image.new("CMYK", (20, 20), (0, 255, 255, 0))
    assert load_image(saved(cmyk, tmp_path / "c.tif")).getpixel((1, 1)) == (255, 0, 0)
    assert load_image(saved(gradient().convert("CMYK"), tmp_path / "c.jpg", quality=95)).mode == "RGB"
    assert load_image(saved(Image.new("1", (20, 20), 1), tmp_path / "b.png")).getpixel((1, 1)) == (255, 255, 255)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path, suffix: str) -> None:
    ramp = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (32, 1))
    image = load_image(saved(Image.fromarray(ramp), tmp_path / f"a.{suffix}"))
    expected = np.tile(np.round(np.linspace(0, 255, 64)), (32, 1))
    assert np.abs(np.asarray(image)[..., 0] - expected).max() <= 1  # one grey level of rounding


def test_the_transparent_value_of_sixteen_bits_is_white(tmp_path: Path) -> None:
    """It was seen as the grey that it is stored as."""
    values = np.full((32, 64), 30_000, np.uint16)
    values[:, :8] = 257
    image = load_image(saved(Image.fromarray(values), tmp_path / "a.png", transparency=257))
    assert image.getpixel((3, 3)) == (255, 255, 255) and image.getpixel((30, 3)) == (117, 117, 117)


def test_floating_point_picture(tmp_path: Path) -> None:
    ramp = np.tile(np.linspace(0, 1, 64, dtype=np.float32), (32, 1))
    image = load_image(saved(Image.fromarray(ramp), tmp_path / "f.tif"))
    assert image.getpixel((63, 0)) == (255, 255, 255) and image.getpixel((0, 0)) == (0, 0, 0)


def test_bad_files_are_named_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "empty.jpg").write_bytes(b"")
    whole = saved(gradient(400, 300), tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    whole = saved(gradient(400, 300), tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    saved(Image.new("RGB", (1, 1)), tmp_path / "dot.png")
    (tmp_path / "forged.png").write_bytes(png_header(30_000, 30_000))
    (tmp_path / "large.png").write_bytes(png_header(14_000, 12_000))
    expected = {
        "missing.png": "no such file", "text.png": "not a picture", "empty.jpg": "not a picture",
        "cut.jpg": "truncated", "cut.png": "truncated", "dot.png": f"at least {MIN_SIDE} px",
        "forged.png": "150 million pixels", "large.png": "150 million pixels", ".": "folder",
    }  # fmt: skip
    for name, message in expected.items():
        with pytest.raises(UserError, match=message) as caught:
            load_image(tmp_path / name)
        assert name.strip(".") in str(caught.value) and "\n" not in str(caught.value)


def grey_tiff(path: Path, values: np.ndarray) -> Path:
    return saved(Image.fromarray(values), path)


RAMP = np.tile(np.linspace(0, 1, 64), (32, 1))


@pytest.mark.parametrize(
    ("values", "white"),
    [
        (RAMP.astype(np.float32), 1), ((RAMP * 255).astype(np.float32), 255),
        ((RAMP * 65535).astype(np.float32), 65535),
        ((RAMP * 1.08 - 0.05).astype(np.float32), 1), ((RAMP * 200).astype(np.int32), 255),
        ((RAMP * 40_000).astype(np.int32), 65535), ((RAMP * 200).astype(np.uint16), 65535),
    ],
)  # fmt: skip
def test_numbers_are_read_by_their_range(tmp_path: Path, values: np.ndarray, white: float) -> None:
    """A float TIFF of values up to 255 was black, for white was taken to be 65535."""
    shown = np.asarray(load_image(grey_tiff(tmp_path / "a.tif", values)))[..., 0]
    expected = (values.astype(float) / white).clip(0, 1) * 255
    assert np.abs(shown - expected).max() <= 0.51  # rounding to a whole grey level


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ((RAMP * 3).astype(np.float32), "values from 0 to 3, expected 0 to 1, 255 or 65535"),
        ((RAMP * 2 - 1).astype(np.float32), "values from -1 to 1"),
        ((RAMP * 1e6).astype(np.float32), "values from 0 to 1e+06"),
        ((RAMP * 1e9).astype(np.int32), "values from 0 to 1e+09, expected 0 to 255 or 65535"),
        ((RAMP * 10 - 5).astype(np.int32), "values from -5 to 5"),
        (np.full((32, 32), np.nan, np.float32), "no numbers"),
    ],
)
def test_numbers_whose_white_is_unknown_are_refused(tmp_path: Path, values: np.ndarray, says: str) -> None:
    with pytest.raises(UserError, match=re.escape(says)):
        load_image(grey_tiff(tmp_path / "a.tif", values))


def fixed(*values: float) -> bytes:
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def profile(swapped: bool, size: int = 0) -> bytes:
    """An ICC profile like sRGB's, with the primaries of red and blue exchanged if `swapped`, and `size` bytes more."""
    red, green, blue = (0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141)
    primaries = (blue, green, red) if swapped else (red, green, blue)
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, 563) + b"\0\0"  # gamma 2.2
    text = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + b"\0" * 78
    tags = [(b"desc", text + b"\0" * (-len(text) % 4)), (b"cprt", b"text\0\0\0\0none\0\0\0\0" + b"\1" * size)]
    tags += [(b"wtpt", b"XYZ \0\0\0\0" + fixed(0.9642, 1, 0.8249))]
    names = (b"rXYZ", b"gXYZ", b"bXYZ")
    tags += [(name, b"XYZ \0\0\0\0" + fixed(*xyz)) for name, xyz in zip(names, primaries, strict=True)]
    tags += [(name, curve) for name in (b"rTRC", b"gTRC", b"bTRC")]
    return packed(b"RGB ", tags)


def profile_of_greys(gamma: float) -> bytes:
    """An ICC profile for one channel, as programs write it into pictures of greys ("Dot Gain 20%")."""
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    text = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"grey\0" + b"\0" * 78
    tags = [(b"desc", text + b"\0" * (-len(text) % 4)), (b"cprt", b"text\0\0\0\0none\0\0\0\0"), (b"kTRC", curve)]
    return packed(b"GRAY", [*tags, (b"wtpt", b"XYZ \0\0\0\0" + fixed(0.9642, 1, 0.8249))])


def packed(space: bytes, tags: list[tuple[bytes, bytes]]) -> bytes:
    """An ICC profile of these tags."""
    position, table, body = 132 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, content in tags:
        table += name + struct.pack(">II", position + len(body), len(content))
        body += content
    head = struct.pack(">I4sI4s4s4s", position + len(body), b"lcms", 0x02100000, b"mntr", space, b"XYZ ")
    head += struct.pack(">6H", 2024, 1, 1, 0, 0, 0) + b"acsp" + b"\0" * 28 + fixed(0.9642, 1, 0.8249)
    return head.ljust(128, b"\0") + table + body


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.webp"])
@pytest.mark.parametrize("alpha", [False, True])
def test_colour_profiles_are_applied(tmp_path: Path, name: str, alpha: bool) -> None:
    red, green, blue = gradient().split()
    stored = Image.merge("RGB", (blue, green, red))
    if alpha:
        stored.putalpha(255)
    options = {"lossless": True} if name.endswith("webp") else {}
    path = saved(stored, tmp_path / name, icc_profile=profile(swapped=True), **options)
    error = np.abs(np.asarray(load_image(path)).astype(float) - np.asarray(gradient()))
    assert error.mean() < 4  # gamma 2.2 instead of sRGB's curve: at most 4 grey levels in the darks


@pytest.mark.parametrize("mode", ["L", "LA"])
def test_a_profile_of_greys_is_applied(tmp_path: Path, mode: str) -> None:
    """Beside transparency it was passed over: a grey cut-out was darker than the same picture without."""
    stored = Image.new("L", (20, 20), 118)  # linear light (118 / 255) ** 1.0 = 0.463, which is 181 in sRGB
    if mode == "LA":
        stored = Image.merge("LA", [stored, Image.new("L", (20, 20), 255)])
        stored.putpixel((0, 0), (118, 0))
    image = load_image(saved(stored, tmp_path / "a.png", icc_profile=profile_of_greys(1.0)))
    assert np.abs(np.array(image.getpixel((9, 9))) - 181).max() <= 1
    assert mode == "L" or image.getpixel((0, 0)) == (255, 255, 255)


def test_profiles_that_do_not_apply(tmp_path: Path) -> None:
    """sRGB's own changes no bit; one for other channels is passed over, as viewers do; a damaged one is said."""
    own = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert load_image(saved(gradient(), tmp_path / "a.png", icc_profile=own)).tobytes() == gradient().tobytes()
    grey = saved(gradient().convert("L"), tmp_path / "g.png", icc_profile=profile(swapped=True))
    assert load_image(grey).tobytes() == gradient().convert("L").convert("RGB").tobytes()
    assert as_rgb(load_image(grey)).tobytes() == load_image(grey).tobytes()  # nor later, when the channels are three
    broken = saved(gradient(), tmp_path / "b.png", icc_profile=b"no profile")
    with pytest.warns(Notice, match="b.png: its colour profile cannot be used"):
        assert load_image(broken).tobytes() == gradient().tobytes()


def test_png_with_large_profile_and_text(tmp_path: Path) -> None:
    """Pillow refuses either above 1 MB; its limits are as they were afterwards."""
    text = PngImagePlugin.PngInfo()
    text.add_text("prompt", "a" * 3_000_000, zip=True)
    swapped = Image.merge("RGB", gradient().split()[::-1])
    path = saved(swapped, tmp_path / "a.png", icc_profile=profile(swapped=True, size=3_000_000), pnginfo=text)
    limit = PngImagePlugin.MAX_TEXT_CHUNK
    error = np.abs(np.asarray(load_image(path)).astype(float) - np.asarray(gradient()))
    assert error.mean() < 4 and limit == PngImagePlugin.MAX_TEXT_CHUNK == 2**20


def test_the_first_frame_is_used_and_said(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "lime", "blue")]
    for name in ("a.gif", "a.png", "a.webp", "a.tif"):
        path = saved(frames[0], tmp_path / name, save_all=True, append_images=frames[1:])
        with pytest.warns(Notice, match=f"{name} has 3 frames: its first is used"):
            red, green, blue = load_image(path).getpixel((5, 5))  # type: ignore[misc]
        assert red > 250 and green < 5 and blue < 5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_image(saved(frames[0], tmp_path / "one.gif"))


def test_damaged_exif_costs_the_turn_alone(tmp_path: Path) -> None:
    path = saved(gradient(), tmp_path / "a.png", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Notice)
        assert load_image(path).tobytes() == gradient().tobytes()


def test_a_header_is_enough_to_check_a_picture(tmp_path: Path) -> None:
    saved(gradient(), tmp_path / "a.png")
    check_image(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("hello")
    with pytest.raises(NotAnImage, match="b.png is not a picture"):
        check_image(tmp_path / "b.png")
    with pytest.raises(UserError, match="no such file"):
        check_image(tmp_path / "c.png")
    os.mkfifo(tmp_path / "d.png")
    with pytest.raises(UserError, match="a pipe or a device"):
        load_image(tmp_path / "d.png")


def test_transparency_that_an_edit_loses_is_said(tmp_path: Path) -> None:
    opaque = gradient().convert("RGBA")
    holes = opaque.copy()
    holes.putpixel((3, 3), (0, 0, 0, 0))
    with pytest.warns(Notice, match="a.png is transparent in places: the result is opaque, and white there"):
        notice_transparency(saved(holes, tmp_path / "a.png"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", Notice)
        notice_transparency(saved(opaque, tmp_path / "b.png"))
        notice_transparency(saved(gradient(), tmp_path / "c.png"))
        frames = [gradient(), gradient(24)]
        notice_transparency(saved(frames[0], tmp_path / "d.gif", save_all=True, append_images=frames[1:]))
