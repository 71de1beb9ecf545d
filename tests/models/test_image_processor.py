"""Pictures of any size on a base model's terms."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from personalize.models.image_processor import PaddedImage
from tests.support.photos import shared


def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    ("size", "enlarge", "expected"),
    [
        ((32, 32), True, (64, 64)),  # the tiny base's own side is 64 px
        ((32, 32), False, (32, 32)),
        ((24, 32), True, (74, 55)),  # 64² px at 3:4: 4,070 of 4,096
        ((256, 64), True, (32, 128)),
        ((62, 62), True, (62, 62)),  # 3 % too small: not resampled
    ],
)
def test_pictures_are_brought_to_the_bases_own_size_and_back(size, enlarge, expected):
    frame = PaddedImage.of(shared(), picture(*size), enlarge=enlarge)
    assert frame.size == expected and all(side % 32 == 0 for side in frame.pixels.shape[-2:])
    assert frame.to_picture(frame.pixels).size == size


def test_a_resolution_is_a_side_of_the_square_of_the_same_area():
    assert PaddedImage.of(shared(), picture(32, 32), 48, enlarge=True).size == (48, 48)
    assert PaddedImage.of(shared(), picture(320, 80), 32, enlarge=True).size == (16, 64)
