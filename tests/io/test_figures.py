"""Figures: labelled grids of pictures, and PNG files."""

import numpy as np
import pytest
from PIL import Image

from personalize.io.figures import grid, png, scaled_to_side


def test_a_grid_holds_every_picture_at_its_place():
    red, blue = Image.new("RGB", (64, 64), "red"), Image.new("RGB", (64, 32), "blue")
    sheet = grid([[red, None], [None, blue]], columns=["one", "two"], labels=["a", "b"], title="all", cell=64)
    colours = {colour for _, colour in sheet.getcolors(sheet.width * sheet.height)}
    assert (255, 0, 0) in colours and (0, 0, 255) in colours
    counts = {colour: count for count, colour in sheet.getcolors(sheet.width * sheet.height)}
    assert counts[255, 0, 0] == 64 * 64 and counts[0, 0, 255] == 64 * 32


def test_pictures_keep_their_shape():
    assert scaled_to_side(Image.new("RGB", (200, 100)), 64).size == (64, 32)


def test_an_empty_grid_or_a_missing_label_is_refused():
    with pytest.raises(ValueError, match="at least one picture"):
        grid([[]])
    with pytest.raises(ValueError, match="as many labels"):
        grid([[Image.new("RGB", (8, 8))]], labels=["a", "b"])


def test_equal_pictures_are_equal_files():
    assert png(Image.new("RGB", (8, 8), "red")) == png(Image.new("RGB", (8, 8), "red"))


@pytest.mark.parametrize("title", ["a picture of a cat on the beach, in the style of an old photograph", "猫" * 40])
def test_a_title_wider_than_the_sheet_takes_more_lines(title):
    """It was cut off at the right border, as the prompt above a single picture is."""
    red = Image.new("RGB", (192, 192), "red")
    short, long = grid([[red]], title="a cat"), grid([[red]], title=title)
    more = long.height - short.height
    assert long.width == short.width and more > 0
    ink = np.asarray(long.crop((0, 0, long.width, long.height - 204))).min((0, 2)) < 128
    assert ink.any() and not ink[-4:].any(), "nothing of it touches the border"


def test_no_heading_runs_into_the_next_one():
    """Above pictures of 256 px lines of 36 letters were allowed, of which about 30 fit."""
    white = Image.new("RGB", (256, 256), "white")
    headings = ["a picture of a dog on the beach", "warm mountains, women and a mammoth at noon"]
    sheet = np.asarray(grid([[white, white]], columns=headings, labels=["W" * 27], cell=256)).min(2) < 128
    left = 256 // 2 + 256 // 4 + 6
    for start in (left, left + 262):
        assert not sheet[:, start - 6 : start].any(), "between label, first and second column"
    assert not sheet[:, -6:].any() and sheet[:, :left].any()


def test_every_picture_can_have_a_caption_below_it():
    red = Image.new("RGB", (32, 32), "red")
    bare, captioned = (
        grid([[red, red], [red]]),
        grid([[red, red], [red]], captions=[["one", "two lines\nhere"], ["three"]]),
    )
    assert captioned.width == bare.width and captioned.height > bare.height
    pixels = np.asarray(captioned.convert("L"))
    assert (pixels[192 + 12 : 230, :190] < 128).any(), "ink below the first picture"
    with pytest.raises(ValueError, match="caption for every picture"):
        grid([[red, red]], captions=[["one"]])
