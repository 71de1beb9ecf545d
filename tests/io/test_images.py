"""Reading picture files of every kind, and fitting them to a resolution."""

import math
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from personalize.cli import options
from personalize.errors import UserError
from personalize.io.images import (
    IMAGE_SUFFIXES,
    MIN_SIDE,
    fitted_pixels,
    fitted_size,
    load_image,
    psnr,
    to_image,
    to_pixels,
)


def gradient(width: int = 48, height: int = 32) -> Image.Image:
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 255 - x], -1).astype(np.uint8))


def saved(image: Image.Image, path: Path, **options: object) -> Path:
    image.save(path, **options)  # type: ignore[arg-type]
    return path


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


def test_alpha_is_composited_on_white(tmp_path: Path) -> None:
    image = gradient().convert("RGBA")
    image.putalpha(0)
    for name in ("a.png", "a.webp"):
        assert load_image(saved(image, tmp_path / name)).getpixel((3, 3)) == (255, 255, 255)
    grey = Image.merge("LA", [Image.new("L", (20, 20), 0), Image.new("L", (20, 20), 128)])
    assert load_image(saved(grey, tmp_path / "la.png")).getpixel((3, 3)) == (127, 127, 127)


def test_palette_with_and_without_transparency(tmp_path: Path) -> None:
    palette = Image.new("RGB", (20, 20), (10, 200, 30)).quantize(4)
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


@pytest.mark.parametrize("size", [(512, 512), (4000, 3000), (3000, 4000), (1920, 1080), (700, 2000), (100, 1000)])
@pytest.mark.parametrize(("resolution", "multiple"), [(512, 64), (128, 32), (1024, 64)])
def test_fitted_size_keeps_the_aspect_ratio(size: tuple[int, int], resolution: int, multiple: int) -> None:
    width, height = size
    h, w = fitted_size(height, width, resolution, multiple)
    assert h % multiple == w % multiple == 0
    assert 0.5 <= h * w / resolution**2 <= 2
    step = multiple / min(h, w)  # one multiple more on the short side
    assert abs(math.log(w / h) - math.log(width / height)) <= math.log(1 + step)


def test_fitting_crops_instead_of_distorting() -> None:
    disc = Image.new("L", (330, 330), 0)
    disc.paste(255, (115, 115, 215, 215))
    wide = Image.new("L", (500, 330), 0)
    wide.paste(disc, (85, 0))
    pixels, size = fitted_pixels(wide.convert("RGB"), 128, 32)
    assert pixels.shape[-2:] == size and size != (128, 128)
    rows, columns = (pixels[0, 0] > 0).nonzero(as_tuple=True)
    assert abs((rows.max() - rows.min()) - (columns.max() - columns.min())) <= 1  # a square stays one


def test_a_picture_that_fits_is_unchanged() -> None:
    image = gradient(128, 128)
    pixels, size = fitted_pixels(image, 128, 32)
    assert size == (128, 128) and torch.equal(pixels, to_pixels(image))


def test_too_small_a_resolution_is_refused() -> None:
    with pytest.raises(UserError, match="at least 64"):
        fitted_size(100, 100, 32, 64)


def test_pixels_round_trip_and_psnr() -> None:
    image = gradient()
    pixels = to_pixels(image)
    assert pixels.shape == (1, 3, 32, 48) and pixels.min() >= -1 and pixels.max() <= 1
    assert np.array_equal(np.asarray(to_image(pixels)), np.asarray(image))
    assert np.array_equal(np.asarray(to_image(pixels[0] * 5)), np.asarray(to_image((pixels * 5).clamp(-1, 1))))
    assert psnr(pixels, pixels) == math.inf
    assert psnr(torch.zeros(1, 3, 4, 4), torch.full((1, 3, 4, 4), 0.2)) == pytest.approx(20)  # (2 / 0.2)² = 100
    with pytest.raises(ValueError, match="one picture"):
        to_image(pixels.expand(2, -1, -1, -1))


def test_the_command_line_takes_the_same_suffixes_for_pictures():
    """It has a tuple of its own because it may not import torch."""
    assert options.IMAGE_SUFFIXES == IMAGE_SUFFIXES
