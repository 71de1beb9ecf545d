"""Previews and drags in pixels, on random weights: what moves, what is asked of the model, what is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from personalize.editing.drag.config import DragSettings
from personalize.editing.drag.image import drag_picture, preview_picture
from personalize.editing.drag.inpaint import AllowedKeys, cells_touching
from personalize.editing.editor import Editor
from personalize.errors import UserError
from personalize.models.attention import attention_sites
from tests.support.drag_pictures import picture, square
from tests.support.tiny import tiny_sd1

SETTINGS = DragSettings(steps=3)
POINTS = [(20, 24), (36, 28)]  # 16 px right, 4 down; the mask is (12, 16, 36, 40)


@pytest.fixture(scope="module")
def model():
    return tiny_sd1()


@pytest.fixture(scope="module")
def usual(model):
    return drag_picture(model, picture(), POINTS, mask=square(), settings=SETTINGS)


@pytest.fixture
def asked(monkeypatch, model):
    """The timesteps of all predictions."""
    steps, predict = [], type(model).predict

    def counted(self, latents, timestep, conditioning):
        steps.append(int(timestep))
        return predict(self, latents, timestep, conditioning)

    monkeypatch.setattr(type(model), "predict", counted)
    return steps


def pixels(image):
    return np.asarray(image.convert("RGB")).astype(int)


def test_what_moves_arrives_to_the_pixel_and_the_rest_stays_as_it_was(usual):
    before, after = pixels(picture()), pixels(usual.image)
    assert np.abs(after[20:44, 28:52] - before[16:40, 12:36]).max() <= 1, "one grey level of rounding"
    changed = np.asarray(usual.preview.void) > 0
    changed[20:44, 28:52] = True
    assert np.array_equal(after[~changed], before[~changed])
    assert usual.arrived == ((36, 28),) and usual.missed == (0,) and usual.thresholds == ()


def test_only_the_void_is_sampled_and_it_surrounds_the_old_place(usual):
    void = np.asarray(usual.preview.void) > 0
    expected = np.zeros((64, 64), bool)
    expected[12:44, 8:40] = True  # the mask and one latent cell of four pixels around it
    expected[20:44, 28:52] = False
    assert np.array_equal(void, expected)
    assert not np.array_equal(pixels(usual.image)[void], pixels(usual.preview.warped)[void])


def test_a_preview_asks_one_prediction_for_a_picture_and_none_for_the_next_drag_of_it(model, asked):
    editor = Editor(model)
    editor.drag_preview(POINTS, picture(), mask=square(), settings=SETTINGS)
    assert asked == [50]
    preview = editor.drag_preview([(20, 24), (30, 30)], picture(), mask=square(), settings=SETTINGS)
    assert asked == [50] and preview.arrived == ((30, 30),)
    editor.drag(POINTS, picture(), mask=square(), settings=SETTINGS)
    assert asked == [50, 1], "half of three steps"
    editor.drag_preview(POINTS, picture(seed=1), mask=square(), settings=SETTINGS)
    assert asked == [50, 1, 50], "another picture is read anew"


def test_a_preview_is_what_the_drag_does_before_it_fills(model, usual):
    preview = preview_picture(model, picture(), POINTS, mask=square(), settings=SETTINGS)
    assert preview.warped.tobytes() == usual.preview.warped.tobytes()
    assert preview.share == pytest.approx(24 * 24 / 64**2)
    assert preview.overlay.tobytes() == usual.overlay.tobytes()


def test_attentiondrag_d4_a_drag_of_length_zero_returns_the_picture_without_sampling(model, asked):
    found = drag_picture(model, picture(), [(20, 24), (20, 24)], mask=square(), settings=SETTINGS)
    assert found.image.tobytes() == picture().tobytes() and asked == [50]
    assert "nothing is uncovered" in found.notes[0]


def test_an_object_that_is_dragged_nowhere_beside_one_that_moves_has_no_void(model):
    """The band around it was filled anew."""
    both = square(box=(4, 4, 20, 20))
    both.paste(255, (36, 36, 52, 52))
    found = preview_picture(model, picture(), [(12, 12), (12, 12), (44, 44), (50, 44)], mask=both, settings=SETTINGS)
    void = np.asarray(found.void) > 0
    assert not void[:28, :28].any() and void[36:52, 32:40].all()
    assert np.array_equal(pixels(found.warped)[:28, :28], pixels(picture())[:28, :28])


def test_attentiondrag_d8_same_seed_same_output_and_the_model_is_as_before(model, usual):
    before = {name: tensor.clone() for name, tensor in model.unet.state_dict().items()}
    processors = dict(model.unet.attn_processors)
    again = drag_picture(model, picture(), POINTS, mask=square(), settings=SETTINGS)
    other = drag_picture(model, picture(), POINTS, mask=square(), settings=replace(SETTINGS, seed=7))
    assert again.image.tobytes() == usual.image.tobytes() != other.image.tobytes()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.unet.state_dict().items())
    assert all(model.unet.attn_processors[name] is one for name, one in processors.items())


@pytest.mark.parametrize(
    "change",
    [{"fill": "bnni"}, {"fill": "attention"}, {"fill_keys": "all"}, {"protect": False},
     {"strength": 1.0}, {"clearance": 0.0}, {"grow": 3}, {"grow": -3}],
    ids=str,
)  # fmt: skip
def test_every_setting_does_something(model, usual, change):
    found = drag_picture(model, picture(), POINTS, mask=square(), settings=replace(SETTINGS, **change))
    assert found.image.tobytes() != usual.image.tobytes()


def test_grow_and_shrink_are_in_pixels(model):
    for grow, side in ((2, 28), (-2, 20)):
        preview = preview_picture(model, picture(), POINTS, mask=square(), settings=replace(SETTINGS, grow=grow))
        assert (np.asarray(preview.mask) > 0).sum() == side**2


def test_a_masks_transparency_is_black(model):
    shape = Image.merge("RGBA", [Image.new("L", (64, 64), 255)] * 3 + [square()])
    assert preview_picture(model, picture(), POINTS, mask=shape, settings=SETTINGS).share == 24 * 24 / 64**2


def test_two_things_are_moved_apart(model):
    mask = square(box=(8, 24, 20, 36))
    mask.paste(255, (40, 24, 52, 36))
    found = preview_picture(model, picture(), [(14, 30), (14, 14), (46, 30), (46, 46)], mask=mask, settings=SETTINGS)
    before, after = pixels(picture()), pixels(found.warped)
    assert np.abs(after[8:20, 8:20] - before[24:36, 8:20]).max() <= 1
    assert np.abs(after[40:52, 40:52] - before[24:36, 40:52]).max() <= 1


def test_a_box_is_moved_and_scaled_in_the_mode_region(model):
    settings = replace(SETTINGS, mode="region", region_map="affine")
    preview = preview_picture(model, picture(), [(8, 8, 24, 24), (32, 24, 64, 40)], settings=settings)
    mask, covered = np.asarray(preview.mask) > 0, preview.drag.covered.numpy()
    assert 16**2 <= mask.sum() <= 17**2 and mask[8:24, 8:24].all()
    assert covered[26:38, 34:60].all() and 28 * 14 <= covered.sum() <= 34 * 18


def test_three_points_turn_and_scale_what_the_mask_holds(model):
    settings = replace(SETTINGS, mode="region")
    centre, arms = (24.0, 28.0), [(24.0, 18.0), (34.0, 28.0), (14.0, 28.0)]
    ends = [(centre[0] - 1.4 * (y - centre[1]), centre[1] + 1.4 * (x - centre[0])) for x, y in arms]  # 90°, 1.4 times
    points = [point for pair in zip(arms, ends, strict=True) for point in pair]
    preview = preview_picture(model, picture(), points, mask=square(), settings=settings)
    assert preview.arrived == tuple(pytest.approx(end) for end in ends)
    assert int(preview.drag.covered.sum()) == pytest.approx(1.4**2 * 24**2, rel=0.06), "one pixel along the border"


def test_deform_moves_the_handle_all_the_way_and_the_border_less(model):
    settings = replace(SETTINGS, mode="deform", displacement="stretch")
    preview = preview_picture(model, picture(), [(24, 28), (30, 28)], mask=square(), settings=settings)
    assert preview.arrived[0] == pytest.approx((30, 28), abs=1.0)
    assert np.array_equal(pixels(preview.warped)[:, :8], pixels(picture())[:, :8])


@pytest.mark.parametrize("mode", ["move", "deform"])
def test_a_handle_beside_the_mask_moves_nothing_and_stays(model, mode):
    """In the mode deform it ended in an IndexError."""
    beside = [*POINTS, (55, 55), (50, 50)]
    alone, found = (
        preview_picture(model, picture(), points, mask=square(), settings=replace(SETTINGS, mode=mode))
        for points in (POINTS, beside)
    )
    assert found.arrived == (alone.arrived[0], (55, 55))
    assert np.array_equal(pixels(found.warped), pixels(alone.warped))
    with pytest.raises(UserError, match="the mask is empty: paint white what may move, or shrink it less"):
        preview_picture(model, picture(), POINTS, mask=square(), settings=replace(SETTINGS, mode=mode, grow=-30))


def test_what_no_handle_lies_on_moves_once_and_with_the_nearest_one(model):
    """A third part of the mask went with both handles, and was seen at two places."""
    mask = square(box=(4, 4, 16, 16))
    mask.paste(255, (48, 4, 60, 16))
    mask.paste(255, (4, 22, 12, 30))  # below the first
    found = preview_picture(model, picture(), [(10, 10), (12, 10), (54, 10), (54, 30)], mask=mask, settings=SETTINGS)
    covered = np.asarray(found.drag.covered)
    expected = np.zeros((64, 64), bool)
    expected[4:16, 6:18] = expected[24:36, 48:60] = expected[22:30, 6:14] = True
    assert np.array_equal(covered, expected)


def test_a_large_photo_keeps_its_own_detail_where_things_have_moved(model):
    """Worked on at 64 px, a photo of 256 px came back four times as coarse there, without a word."""
    photo = np.asarray(picture(256, 256), np.int16)
    photo = (photo + np.where(np.indices((256, 256)).sum(0) % 2, 20, -20)[..., None]).clip(0, 255)  # one pixel fine
    large = Image.fromarray(photo.astype(np.uint8))
    mask = square(256, 256, (48, 64, 144, 160))
    found = drag_picture(model, large, [(80, 96), (144, 112)], mask=mask, settings=SETTINGS, resolution=64)
    moved = pixels(found.image)[88:168, 120:200]  # 64 right, 16 down, without the border that is blended
    error = np.abs(moved - pixels(large)[72:152, 56:136])
    assert error.mean() < 2, "the detail is warped between the small picture's pixels"
    assert "what it uncovers is drawn at 64×64 px" in found.notes[-1]
    still = drag_picture(model, large, [(80, 96), (80, 96)], mask=mask, settings=SETTINGS, resolution=64)
    assert still.image.tobytes() == large.tobytes()


def test_a_box_moves_what_the_mask_allows_grown_by_the_setting(model):
    settings, points = replace(SETTINGS, mode="region", region_map="affine"), [(8, 8, 24, 24), (32, 24, 48, 40)]
    share = {
        grow: preview_picture(model, picture(), points, mask=square(box=(8, 8, 16, 24)),
                              settings=replace(settings, grow=grow)).share
        for grow in (0, 2)
    }  # fmt: skip
    assert share[0] == pytest.approx(8 * 16 / 64**2, abs=17 / 64**2)  # a box may have its last row and column
    assert share[2] > share[0] * 1.5


@pytest.mark.parametrize(
    ("points", "more", "message"),
    [
        ([(20, 24), (36, 28)], {"settings": replace(SETTINGS, method="latents")}, "has no preview"),
        ([(8, 8, 24, 24), (32, 24, 64, 40)], {}, "need the mode region"),
        ([(8, 8, 8, 24), (32, 24, 64, 40)], {"settings": replace(SETTINGS, mode="region")}, "is empty"),
        ([(8, 8), (9, 9)], {"settings": replace(SETTINGS, mode="region")}, "needs at least 2"),
        ([(20, 24), (36, 280)], {}, "outside the picture"),
        (POINTS, {"add": [(500, 5)]}, r"point of the mask 500,5 is outside the picture"),
        (POINTS, {"remove": [(-5, 5)]}, r"point of the mask -5,5 is outside the picture"),
        (POINTS, {"mask": square(), "add": [(30, 30)]}, "the given mask takes its place"),
        (
            [(8, 8, 24, 24), (32, 24, 48, 40)],
            {"settings": replace(SETTINGS, mode="region"), "remove": [(30, 30)]},
            "boxes and polygons say themselves what moves",
        ),
        (
            [(20, 24), (36, 28), (30, 30), (40, 30)],
            {"mask": square(), "settings": replace(SETTINGS, weights="ratio")},
            "need the mask that attention finds",
        ),
        (POINTS, {"mask": Image.new("L", (64, 64))}, "the mask is black everywhere"),
        (POINTS, {"mask": Image.new("L", (64, 64), 255)}, "covers the whole picture"),
        (POINTS, {"mask": Image.new("L", (32, 64), 255)}, "give a mask of the picture's size"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(model, points, more, message):
    with pytest.raises(UserError, match=message) as caught:
        preview_picture(model, picture(), points, **{"settings": SETTINGS, **more})
    assert "\n" not in str(caught.value)


def test_a_handle_on_the_background_is_refused_unless_a_mask_is_given(model):
    """Random weights attend to everything alike, so that whatever is under the handle spreads over the picture."""
    with pytest.raises(UserError, match="background"):
        preview_picture(model, picture(), POINTS, settings=SETTINGS)
    assert preview_picture(model, picture(), POINTS, mask=square(), settings=SETTINGS).share > 0


def test_keys_of_the_objects_are_left_out():
    sites = attention_sites(tiny_sd1().unet, (16, 16))
    site = next(site for site in sites.values() if not site.cross and site.height == 16)
    allowed = torch.ones(16, 16, dtype=torch.bool)
    allowed[4:8, 4:8] = False
    hook, k = AllowedKeys(allowed), torch.arange(256.0).view(1, 1, 256, 1)
    q, kept, _ = hook.qkv(k, k, k, site)
    assert len(q[0, 0]) == 256 and torch.equal(kept.flatten(), allowed.flatten().nonzero()[:, 0].float())
    nowhere = AllowedKeys(torch.zeros(16, 16, dtype=torch.bool))
    assert torch.equal(nowhere.qkv(k, k, k, site)[1], k), "attention needs something to look at"


def test_cells_that_hold_a_pixel_are_touched():
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[7, 8] = True
    assert cells_touching(mask, (16, 16)).nonzero().tolist() == [[1, 2]]
