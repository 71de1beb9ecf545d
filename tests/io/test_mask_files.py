"""Masks are read by what their pixels mean, whatever their mode."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from personalize.errors import Notice, UserError
from personalize.io.mask_files import as_mask, load_mask
from tests.support.picture_files import saved

ROOT = Path(__file__).parents[2]
SPRITES = ROOT / "personalize" / "embedded" / "sprites"


def cut_out(mode: str, inside: tuple[int, ...], outside: tuple[int, ...]) -> Image.Image:
    """A picture of 64 px with a square of 32 px in the corner, of another colour."""
    image = Image.new(mode, (64, 64), outside)
    ImageDraw.Draw(image).rectangle((0, 0, 31, 31), fill=inside)
    return image


@pytest.mark.parametrize(
    ("mode", "inside", "outside"),
    [
        ("RGBA", (255, 255, 255, 255), (0, 0, 0, 0)),
        ("RGBA", (255, 255, 255, 255), (255, 255, 255, 0)),
        ("LA", (255, 255), (255, 0)),
        ("LA", (255, 255), (0, 255)),
        ("RGBA", (0, 0, 0, 255), (0, 0, 0, 0)),  # painted in any one colour on nothing
        ("RGBA", (200, 30, 30, 255), (255, 255, 255, 0)),
        ("RGB", (255, 255, 255), (0, 0, 0)),
    ],
)
def test_what_a_mask_leaves_out_is_black(
    tmp_path: Path, mode: str, inside: tuple[int, ...], outside: tuple[int, ...]
) -> None:
    image, expected = cut_out(mode, inside, outside), np.zeros((64, 64))
    expected[:32, :32] = 255
    for mask in (load_mask(saved(image, tmp_path / "m.png")), as_mask(image)):
        assert mask.mode == "L" and np.array_equal(np.asarray(mask), expected)


def test_colours_of_a_mask_count_where_they_say_something(tmp_path: Path) -> None:
    image = cut_out("RGBA", (255, 255, 255, 255), (0, 0, 0, 255))
    ImageDraw.Draw(image).rectangle((48, 48, 63, 63), fill=(255, 255, 255, 0))
    mask = load_mask(saved(image, tmp_path / "m.png"))
    assert [mask.getpixel(place) for place in ((5, 5), (40, 5), (60, 60))] == [255, 0, 0]
    opaque = cut_out("RGBA", (128, 128, 128, 255), (128, 128, 128, 255))  # no transparency: a grey mask
    assert as_mask(opaque).getextrema() == (128, 128)


def pictured(sprite: str, background: str | None) -> Image.Image:
    """A drawing with its shades on a background, or cut out."""
    image = Image.open(SPRITES / f"{sprite}.webp").convert("RGBA")
    return image if background is None else Image.alpha_composite(Image.new("RGBA", image.size, background), image)


@pytest.mark.parametrize("sprite", ["3d/cat", "3d/tiger", "modern/car", "3d/fox"])
def test_the_mask_of_a_coloured_cut_out_is_its_alpha_and_none_without(tmp_path: Path, sprite: str) -> None:
    """Read by brightness, dark parts of the thing were left out."""
    mask = load_mask(saved(pictured(sprite, None), tmp_path / "m.png"))
    assert np.array_equal(np.asarray(mask), np.asarray(pictured(sprite, None).getchannel("A")))
    for background in ("black", "white", "#4080c0"):
        opaque = pictured(sprite, background).convert("RGB")
        for name in ("m.png", "m.jpg"):
            with pytest.raises(UserError, match=rf"{name} is a coloured picture, .*: bring one that is white") as found:
                load_mask(saved(opaque, tmp_path / name))
            assert "\n" not in str(found.value)


@pytest.mark.parametrize("colour", ["white", "yellow", "#c0d040"])
@pytest.mark.parametrize("soft", [0, 6])
def test_paint_in_one_colour_and_soft_greys_are_no_coloured_picture(tmp_path: Path, colour: str, soft: int) -> None:
    """In JPEG too, whose compression adds colours at edges."""
    image = Image.new("RGB", (256, 256))
    ImageDraw.Draw(image).ellipse((60, 40, 180, 200), fill=colour)
    image = image.filter(ImageFilter.GaussianBlur(soft))
    for name in ("m.png", "m.jpg"):
        mask = np.asarray(load_mask(saved(image, tmp_path / name)))
        assert mask[120, 120] > 180 and mask[5, 5] < 8
        assert soft == 0 or 0.05 < ((mask > 20) & (mask < 180)).mean()
    grey = Image.linear_gradient("L")
    assert np.array_equal(np.asarray(load_mask(saved(grey, tmp_path / "g.png"))), np.asarray(grey))


def test_a_photo_of_two_flat_colours_is_no_mask() -> None:
    """Grass and sky, whose colours lie on one line; grass is nearly as bright as what chooses, and would not."""
    with pytest.raises(UserError, match="is a coloured picture"):
        load_mask(ROOT / "examples" / "pictures" / "mushroom.png")


def test_paint_in_a_bright_and_a_dark_colour_says_nothing(tmp_path: Path) -> None:
    """Red and yellow for two things: only the brighter one would be chosen."""
    image = cut_out("RGB", (255, 0, 0), (0, 0, 0))
    ImageDraw.Draw(image).rectangle((40, 40, 60, 60), fill=(255, 255, 0))
    with pytest.raises(UserError, match="is a coloured picture"):
        load_mask(saved(image, tmp_path / "m.png"))


def test_a_mask_of_one_colour(tmp_path: Path) -> None:
    for blank in (Image.new("L", (32, 32)), Image.new("RGBA", (32, 32), (255, 255, 255, 0))):
        with pytest.raises(UserError, match=r"m\.png is black everywhere, so that it chooses nothing"):
            load_mask(saved(blank, tmp_path / "m.png"))
    with pytest.warns(Notice, match="white everywhere"):
        load_mask(saved(Image.new("L", (32, 32), 255), tmp_path / "m.png"))


@pytest.mark.parametrize(("value", "most"), [(1, 1), ((255, 0, 0), 76), (127, 127)])
def test_a_mask_that_is_nowhere_white_is_refused(tmp_path: Path, value: int | tuple[int, ...], most: int) -> None:
    """Class numbers and red paint: as weights they would count next to nothing, as regions nothing."""
    mode = "L" if isinstance(value, int) else "RGB"
    mask = Image.new(mode, (32, 32))
    mask.paste(value, (0, 0, 16, 16))
    with pytest.raises(UserError, match=rf"m\.png has no value above {most} of 255, so that it chooses nothing: paint"):
        load_mask(saved(mask, tmp_path / "m.png"))
    mask.paste("white", (0, 0, 1, 1))
    assert load_mask(saved(mask, tmp_path / "m.png")).getextrema() == (0, 255)
