"""Warps in pixels: where each pixel comes from, and least-squares maps of points."""

from __future__ import annotations

import math

import pytest
import torch

from personalize.editing.drag.pixels import (
    affine_sources,
    field_sources,
    least_squares_map,
    mapped,
    translation,
    warped_layer,
)
from personalize.errors import UserError

CORNERS = [(10.0, 10.0), (50.0, 10.0), (50.0, 40.0), (10.0, 40.0)]


def turned(points, degrees, scale, shift=(0.0, 0.0)):
    z = scale * complex(math.cos(math.radians(degrees)), math.sin(math.radians(degrees)))
    moved = [complex(*point) * z + complex(*shift) for point in points]
    return [(place.real, place.imag) for place in moved]


def test_a_whole_translation_copies_pixels_exactly():
    picture = torch.rand(3, 24, 32) * 2 - 1
    mask = torch.zeros(24, 32, dtype=torch.bool)
    mask[5:12, 6:15] = True
    layer, opacity = warped_layer(picture, mask, affine_sources(translation((7, 4)), (24, 32)))
    assert torch.equal(opacity > 0.5, mask.roll((4, 7), (0, 1)))
    torch.testing.assert_close(layer[:, 9:16, 13:22], picture[:, 5:12, 6:15], atol=2e-4, rtol=0)  # fp32 interpolation


@pytest.mark.parametrize("kind", ["similarity", "affine"])
def test_a_rotation_with_scale_is_found_from_its_points(kind):
    found = least_squares_map(CORNERS, turned(CORNERS, 30, 1.4, (5, -3)), kind)
    assert math.sqrt(float(torch.linalg.det(found[:, :2]))) == pytest.approx(1.4)
    assert math.degrees(math.atan2(float(found[1, 0]), float(found[0, 0]))) == pytest.approx(30)
    assert mapped(found, (20.0, 20.0)) == pytest.approx(turned([(20.0, 20.0)], 30, 1.4, (5, -3))[0])


def test_an_affine_map_stretches_where_a_similarity_takes_the_mean():
    wide = [(2 * x, y) for x, y in CORNERS]
    affine, similarity = (least_squares_map(CORNERS, wide, kind)[:, :2] for kind in ("affine", "similarity"))
    torch.testing.assert_close(affine, torch.tensor([[2.0, 0], [0, 1]], dtype=torch.float64))
    assert similarity[0, 0] == similarity[1, 1] and 1 < similarity[0, 0] < 2 and similarity[0, 1] == 0


@pytest.mark.parametrize(
    ("sources", "kind", "message"),
    [(CORNERS[:1], "similarity", "needs at least 2"), (CORNERS[:2], "affine", "needs at least 3"),
     ([(1.0, 1.0)] * 3, "similarity", "one line or at one place"),
     ([(0.0, 0.0), (1.0, 1.0), (2.0, 2.0)], "affine", "one line or at one place")],
)  # fmt: skip
def test_points_that_determine_no_map_are_refused(sources, kind, message):
    with pytest.raises(UserError, match=message):
        least_squares_map(sources, sources, kind)


def test_targets_at_one_place_are_refused():
    with pytest.raises(UserError, match="nothing would be left"):
        least_squares_map(CORNERS, [(5.0, 5.0)] * 4, "similarity")


@pytest.mark.parametrize("steepness", [0.3, 1.0, 2.5])
def test_a_field_is_inverted_and_where_it_folds_what_comes_from_farthest_is_seen(steepness):
    """v = peak · (1 − |p − c| / R): stretched behind the handle c, folded before it from a slope of 1 on.

    The place found for q solves s + v(s) = q to a twentieth of a pixel, but for the kink at the handle, which a
    bilinear field blunts; the handle arrives where it was dragged, and so does everything behind it, without holes.
    """
    size, centre, reach = 96, 40.0, 16.0
    rows, columns = torch.meshgrid(torch.arange(float(size)), torch.arange(float(size)), indexing="ij")
    share = (1 - ((columns - centre) ** 2 + (rows - 48) ** 2).sqrt() / reach).clamp(min=0)
    peak = steepness * reach
    field = torch.stack([peak * share, torch.zeros_like(share)], -1)
    sources = field_sources(field, torch.ones(size, size, dtype=torch.bool))
    line = sources[48, :, 0]
    assert float(line[round(centre + peak)]) == pytest.approx(centre, abs=0.5), "the kink at the handle is half a pixel"
    for x in range(round(centre - reach), round(centre + peak)):
        s = float(line[x])
        behind = (x - peak * (1 - centre / reach)) / (1 + peak / reach)  # of the branch that rises to the handle
        assert s == pytest.approx(behind, abs=0.05) or abs(s - centre) < 1, x
    assert bool((sources[..., 0] > -1).all()), "something arrives at every pixel of the frame"


def test_only_what_is_in_the_mask_arrives():
    """The background that a field would carry along covers nothing."""
    mask = torch.zeros(40, 40, dtype=torch.bool)
    mask[10:20, 5:15] = True
    field = torch.zeros(40, 40, 2)
    field[..., 0] = 18.0
    _, opacity = warped_layer(torch.zeros(3, 40, 40), mask, field_sources(field, mask))
    assert torch.equal(opacity > 0.5, mask.roll(18, 1))


def test_shrinking_blurs_first_so_that_stripes_do_not_alias():
    stripes = (torch.arange(64) % 2).float().repeat(64, 1)[None].repeat(3, 1, 1) * 2 - 1
    matrix = least_squares_map(CORNERS, turned(CORNERS, 0, 0.3), "similarity")
    sources, mask = affine_sources(matrix, (64, 64)), torch.ones(64, 64, dtype=torch.bool)
    smooth, sharp = (warped_layer(stripes, mask, sources, scale)[0][:, 4:14, 4:14] for scale in (0.3, 1.0))
    assert smooth.std() < 0.1 < sharp.std()
