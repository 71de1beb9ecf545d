"""Fitting pictures to a resolution, and converting them to pixels and back."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from personalize.adapters.subjects import Subject
from personalize.errors import UserError
from personalize.io.image_files import load_image
from personalize.io.images import fitted_pixels, fitted_size, psnr, to_image, to_pixels
from personalize.models.image_processor import as_image
from personalize.training.data.buckets import fit
from personalize.training.data.concepts import ConceptPicture
from tests.support.picture_files import gradient


@pytest.mark.parametrize("size", [(512, 512), (4000, 3000), (3000, 4000), (1920, 1080), (700, 2000), (100, 1000)])
@pytest.mark.parametrize(("resolution", "multiple"), [(512, 64), (128, 32), (1024, 64)])
def test_fitted_size_keeps_the_aspect_ratio(size: tuple[int, int], resolution: int, multiple: int) -> None:
    width, height = size
    h, w = fitted_size(height, width, resolution, multiple)
    assert h % multiple == w % multiple == 0
    assert 0.5 <= h * w / resolution**2 <= 2
    step = multiple / min(h, w)  # one multiple more on the short side
    assert abs(math.log(w / h) - math.log(width / height)) <= math.log(1 + step)


@pytest.mark.parametrize(("size", "fitted"), [((200, 100), (64, 128)), ((100, 200), (128, 64)), ((9, 9), (64, 64))])
def test_of_two_sizes_as_good_the_larger_is_taken(size: tuple[int, int], fitted: tuple[int, int]) -> None:
    """32 × 64 and 64 × 128 px have the shape 2 : 1, and are half and twice 64² pixels."""
    assert fitted_size(size[1], size[0], 64, 32) == fitted


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


def test_values_that_are_no_numbers_are_no_black_picture() -> None:
    with pytest.raises(UserError, match="no numbers"):
        to_image(torch.full((3, 16, 16), math.nan))


def odd_modes() -> dict[str, Image.Image]:
    """Pictures in modes whose plain conversion to RGB shows something else than the file does."""
    grey = np.linspace(0, 65535, 64 * 64).reshape(64, 64)
    cut_out = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    cut_out.paste((0, 0, 255, 255), (16, 16, 48, 48))
    return {"16 bits": Image.fromarray(grey.astype(np.uint16)), "a cut-out": cut_out}


@pytest.mark.parametrize("name", odd_modes())
def test_an_opened_picture_of_any_mode_is_what_its_file_is(name: str, tmp_path: Path) -> None:
    """Plainly converted to RGB, 16 bits are white nearly everywhere, and a cut-out shows what it leaves out."""
    picture = odd_modes()[name]
    picture.save(tmp_path / "picture.png")
    file = load_image(tmp_path / "picture.png")
    assert torch.equal(to_pixels(picture), to_pixels(file))
    assert torch.equal(fitted_pixels(picture, 32, 32)[0], fitted_pixels(file, 32, 32)[0])
    assert torch.equal(fit(picture, None, 32, 32).pixels, fit(file, None, 32, 32).pixels)
    assert as_image(picture).tobytes() == file.tobytes()
    subjects = (Subject("<cat1>", "cat"),)
    assert ConceptPicture(picture, subjects).image.tobytes() == file.tobytes()
