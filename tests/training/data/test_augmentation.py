"""Views of the picture: their shares, their canvas, and how prompts are rearranged."""

import numpy as np
import pytest
import torch
from PIL import Image

from personalize.randomness import generator
from personalize.training.data.augmentation import (
    FAR,
    NEAR,
    View,
    canvas_mask,
    draw_order,
    draw_view,
    render_view,
    reorder_phrases,
)
from personalize.training.data.buckets import FittedImage, fit_into

SQUARE, LARGE = (FittedImage(torch.zeros(1, 3, side, side)) for side in (64, 512))
DRAWS = 10_000
WITHIN = 0.02  # the specification's; four standard deviations of a share of 10 000 draws


def test_disendiff_i_shares_of_the_branches_and_of_swaps() -> None:
    rng = generator(0, "test views")
    prefixes = [draw_view(LARGE, rng).prefix for _ in range(DRAWS)]
    assert sum(prefix in FAR for prefix in prefixes) / DRAWS == pytest.approx(0.266, abs=WITHIN)
    assert sum(prefix in NEAR for prefix in prefixes) / DRAWS == pytest.approx(0.333, abs=WITHIN)
    assert prefixes.count("") / DRAWS == pytest.approx(0.400, abs=WITHIN)
    swaps = sum(draw_order(2, 0.5, rng) == [1, 0] for _ in range(DRAWS))
    assert swaps / DRAWS == pytest.approx(0.5, abs=WITHIN)


def test_disendiff_i_sizes_and_grey_canvas() -> None:
    rng, white = generator(0, "test canvas"), Image.new("RGB", (80, 80), "white")
    far = 0
    for _ in range(300):
        view = draw_view(SQUARE, rng)
        pixels, mask = render_view(white, view, SQUARE), canvas_mask(view, SQUARE, 4)
        assert pixels.shape == (3, 64, 64) and mask.shape == (1, 16, 16)
        inside = pixels.amin(0) > 0.5
        assert int(inside.sum()) == min(view.size[0], 64) ** 2  # the rest of the canvas is 0, mid grey
        if view.prefix in FAR:
            far += 1
            assert 0 < int(mask.sum()) <= (view.size[0] // 4) ** 2
            covered = mask[0].bool().repeat_interleave(4, 0).repeat_interleave(4, 1)
            assert bool(inside[covered].all())  # no cell of the loss looks at the canvas
        else:
            assert bool(mask.all())
    assert far > 50


def test_far_mask_is_one_cell_smaller_on_each_side() -> None:
    assert int(canvas_mask(View(size=(32, 32), top=8, left=16), SQUARE, 4).sum()) == (32 // 4 - 2) ** 2


@pytest.mark.parametrize("mask", [(40, 20, 60, 40), None])
def test_sdxl_is_told_where_a_view_begins_in_the_picture_as_shown(mask: tuple[int, int, int, int] | None) -> None:
    """The pixels say where they come from: 1 of 128 px across is 1/128 of the way from black to white."""
    across = Image.fromarray(
        np.tile(np.linspace(-0.5, 255.5, 128)[None].round().clip(0, 255).astype(np.uint8), (64, 1))
    )
    image, white = across.convert("RGB"), Image.new("L", (128, 64))
    if mask:
        white.paste(255, mask)
    fitted, rng, seen = fit_into((64, 64), image, white if mask else None), generator(0, "test corners"), set()
    for _ in range(40):
        view = draw_view(fitted, rng)
        original, corner, size = (view.time_ids(fitted)[i : i + 2] for i in (0, 2, 4))
        assert original == (64, 128) and size == (64, 64)
        if view.prefix in FAR:
            continue
        seen.add((view.flip, bool(view.prefix)))
        column = float(render_view(image, view, fitted)[0, 0, :8].mean() + 1) / 2  # its middle: 4 px after the corner
        column = 1 - column if view.flip else column
        across_px = view.size[0] * 2 if mask else view.size[1]
        assert column * across_px == pytest.approx(corner[1] + 4, abs=1.5), "rounded corner, and resized greys"
        assert corner[0] == (max(0, -view.top))
    assert len(seen) == 4, "mirrored or not, zoomed in or not"


def test_views_move_masks_as_they_move_the_picture() -> None:
    image, mask = Image.new("RGB", (64, 64), "black"), Image.new("L", (64, 64))
    image.paste("white", (4, 8, 28, 40))
    mask.paste(255, (4, 8, 28, 40))
    rng = generator(0, "test masks")
    for _ in range(20):
        view = draw_view(SQUARE, rng)
        seen, moved = render_view(image, view, SQUARE), render_view(mask, view, SQUARE)
        assert float(((seen[0] > 0.6) == (moved[0] > 0.8)).float().mean()) > 0.96  # the two filters blur differently


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ((0, 1, 2), "photo of a <a> cat, <b> dog and <c> red fox"),
        ((1, 0, 2), "photo of a <b> dog, <a> cat and <c> red fox"),
        ((2, 0, 1), "photo of a <c> red fox, <a> cat and <b> dog"),
    ],
)
def test_prompts_are_rearranged(order: tuple[int, ...], expected: str) -> None:
    assert (
        reorder_phrases("photo of a <a> cat, <b> dog and <c> red fox", ["<a> cat", "<b> dog", "<c> red fox"], order)
        == expected
    )


def test_phrases_with_other_capitals_than_the_concepts_change_places_too() -> None:
    """One of them took the place of the other, which the prompt then named no more."""
    phrases = ["<a> cat", "<b> dog"]
    assert reorder_phrases("A photo of <a> Cat and <b>dog", phrases, (1, 0)) == "A photo of <b>dog and <a> Cat"
    assert reorder_phrases("A photo of <a> Cat and <b>dog", phrases, (0, 1)) == "A photo of <a> Cat and <b>dog"


def test_a_single_concept_is_never_swapped_and_three_take_every_other_order() -> None:
    rng = generator(0, "test order")
    assert draw_order(1, 1.0, rng) == [0]
    assert {tuple(draw_order(3, 1.0, rng)) for _ in range(200)} == {
        (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)
    }  # fmt: skip


def test_mirrored_only_if_asked() -> None:
    """Views were always mirrored, also without augment: logos and text came out wrong."""
    views = [draw_view(SQUARE, generator(seed, "test flips"), random_flip=False) for seed in range(50)]
    assert not any(view.flip for view in views)
    assert [(v.size, v.top, v.left) for v in views] == [
        (v.size, v.top, v.left) for v in (draw_view(SQUARE, generator(seed, "test flips")) for seed in range(50))
    ]
