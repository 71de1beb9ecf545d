"""The background behind a moved object: smooth, or copied from where the picture looks alike."""

from __future__ import annotations

import pytest
import torch

from personalize.editing.drag.background import best_shift, cloned, smoothly_filled
from personalize.editing.drag.mask import dilated
from personalize.errors import UserError


def stripes(height=64, width=96):
    """Vertical stripes with a period of 16 pixels, (3, H, W)."""
    wave = torch.sin(torch.arange(width) * (2 * torch.pi / 16))
    return (0.6 * wave).repeat(3, height, 1)


def hole(height=64, width=96):
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[22:42, 30:52] = True
    return mask


def test_known_pixels_stay_and_a_constant_is_continued():
    picture = torch.full((3, 33, 47), 0.25)
    known = torch.rand(33, 47) > 0.6
    spoilt = torch.where(known, picture, -1.0)
    torch.testing.assert_close(smoothly_filled(spoilt, known), picture, atol=1e-5, rtol=0)


def test_a_texture_is_continued_by_cloning_and_lost_by_smooth_filling():
    truth, void = stripes(), hole()
    spoilt = torch.where(void, 1.0, truth)
    errors = [
        (fill - truth)[:, void].abs().mean() for fill in (cloned(spoilt, void, ~void), smoothly_filled(spoilt, ~void))
    ]
    assert errors[0] < 0.02, "the shift by whole periods gives the truth, but for fp32"
    assert errors[1] > 0.2, "half of the wave's mean size"


def test_shifts_are_whole_periods_also_where_they_are_searched_in_a_smaller_picture():
    for factor in (1, 4):
        wide = [part.repeat_interleave(factor, -1).repeat_interleave(factor, -2) for part in (stripes(), hole())]
        shift = best_shift(*wide, dilated(wide[1], 4) & ~wide[1], ~wide[1])
        assert shift is not None and shift[1] % (16 * factor) == 0 and shift != (0, 0)


def test_nothing_alike_is_not_copied():
    """Around the void the picture is striped, elsewhere it is of another brightness: smooth filling takes over."""
    truth, void = stripes(), hole()
    near = dilated(void, 8)
    picture = torch.where(near, 0.1 * truth - 0.9, 0.9)
    torch.testing.assert_close(cloned(picture, void, ~void)[:, void], smoothly_filled(picture, ~void)[:, void])


def test_a_mask_over_everything_is_refused():
    with pytest.raises(UserError, match="covers the whole picture"):
        smoothly_filled(stripes(), torch.zeros(64, 96, dtype=torch.bool))
