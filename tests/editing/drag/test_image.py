"""Pictures of any size dragged by points in pixels, and what is reported about it."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from personalize.adapters.apply import applied
from personalize.editing.drag.config import DragSettings
from personalize.editing.drag.image import drag_picture
from personalize.editing.drag.overlay import overlay
from personalize.editing.drag.points import handles_and_targets
from personalize.editing.drag.reading import conditioning
from personalize.editing.editor import Editor
from personalize.errors import UserError
from personalize.models.image_processor import PaddedImage
from tests.support.drag_pictures import picture, square
from tests.support.lora_states import random_adapter, text_lora
from tests.support.tiny import tiny_sd1

SETTINGS = DragSettings(method="latents", steps=2, strength=1.0)


@pytest.fixture(scope="module")
def model():
    return tiny_sd1()


@pytest.fixture(scope="module")
def usual(model):
    return drag_picture(model, picture(), [(20, 24), (36, 28)], mask=square(), settings=SETTINGS)


def test_everything_comes_back_in_the_size_of_the_picture(usual):
    assert usual.image.size == usual.mask.size == usual.overlay.size == (64, 64)
    assert np.array_equal(np.asarray(usual.mask), np.asarray(square()))
    assert usual.image.tobytes() != picture().tobytes()
    assert len(usual.arrived) == len(usual.missed) == 1 and usual.notes == ()
    (x, y), missed = usual.arrived[0], usual.missed[0]
    assert (x % 4, y % 4) == (0, 0), "as far within a cell of four pixels as the handle was"
    assert missed == pytest.approx(((x - 36) ** 2 + (y - 28) ** 2) ** 0.5)
    assert 0 < usual.edit_seconds < usual.seconds


def test_the_overlay_shows_handle_target_and_mask(usual):
    colours, plain = np.asarray(usual.overlay).astype(int), np.asarray(picture()).astype(int)
    assert tuple(colours[24, 20]) == (230, 57, 70) and tuple(colours[28, 36]) == (29, 120, 240)
    assert np.abs(colours[34:39, 14:34] - plain[34:39, 14:34]).mean() > 10, "the mask is tinted"
    bare = np.asarray(overlay(picture(), Image.new("L", (64, 64)), [], [], []))
    assert np.abs(bare.astype(int) - plain).max() <= 1


@pytest.mark.parametrize(("width", "height"), [(64, 64), (50, 37), (33, 61), (300, 200), (1000, 90)])
def test_frames_fit_any_picture_and_are_undone(model, width, height):
    frame = PaddedImage.of(model, picture(width, height))
    assert all(side % 32 == 0 for side in frame.pixels.shape[-2:])
    assert frame.size[0] * frame.size[1] <= 64 * 64 * 1.05
    assert frame.to_picture(frame.pixels).size == (width, height)
    if width * height <= 64 * 64:
        assert frame.to_picture(frame.pixels).tobytes() == picture(width, height).tobytes()
    point = (width * 0.7, height * 0.2)
    assert frame.to_point(frame.to_cells(point)) == pytest.approx(point)
    x, y = frame.to_cells((width - 1, height - 1))
    rows, columns = frame.visible.nonzero().max(0).values.tolist()
    assert (int(y), int(x)) == (rows, columns), "the last pixel lies in the last visible cell"


def test_a_frame_repeats_the_border_and_masks_stay_within_the_picture(model):
    frame = PaddedImage.of(model, picture(50, 37))
    assert torch.equal(frame.pixels[..., 37:40, :50], frame.pixels[..., 33:36, :50].flip(-2))
    white = frame.mask_to_cells(Image.new("L", (50, 37), 255))
    assert white[:9, :12].all() and not white[10:].any() and not white[:, 13:].any()
    again = np.asarray(frame.mask_to_picture(white))
    assert again.shape == (37, 50) and again[:36, :48].all()


@pytest.mark.parametrize(("width", "height"), [(50, 37), (96, 60)])
def test_pictures_of_odd_sizes_are_dragged(model, width, height):
    box = (width // 5, height // 5, width // 2, height // 2)
    points = [(box[0] + 3, box[1] + 3), (width - 2, height - 2)]
    found = drag_picture(model, picture(width, height), points, mask=square(width, height, box), settings=SETTINGS)
    assert found.image.size == found.mask.size == (width, height)


def test_pasting_keeps_the_sources_pixels_outside_the_region(model, usual):
    points = [(20, 24), (36, 28)]
    found = drag_picture(model, picture(), points, mask=square(), settings=SETTINGS, paste=True)
    region = np.kron(usual.drag.region.numpy(), np.ones((4, 4), bool))
    source, ours, plain = (np.asarray(image).astype(int) for image in (picture(), found.image, usual.image))
    assert np.array_equal(ours[~region], source[~region]) and not np.array_equal(plain[~region], source[~region])
    inner = np.zeros_like(region)
    inner[20:36, 20:48] = True
    assert np.array_equal(ours[inner], plain[inner])


def test_an_adapter_is_used_and_leaves_no_trace(model, usual):
    adapter = random_adapter(model)
    before = {name: tensor.clone() for name, tensor in model.unet.state_dict().items()}
    points = [(20, 24), (36, 28)]
    found = Editor(model, adapter).drag(points, picture(), mask=square(), settings=SETTINGS)
    assert found.image.tobytes() != usual.image.tobytes()
    after = model.unet.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    assert (
        Editor(model).drag(points, picture(), mask=square(), settings=SETTINGS).image.tobytes() == usual.image.tobytes()
    )


def test_what_the_model_is_told(model):
    adapter = random_adapter(model)
    with torch.no_grad():
        dog, empty = model.prompts(["a dog"]), model.prompts([""])
    assert torch.equal(conditioning(model, None, None, (64, 64)).embeds, empty.embeds)
    assert torch.equal(conditioning(model, None, "a dog", (64, 64)).embeds, dog.embeds)
    assert torch.equal(conditioning(model, adapter, "a dog", (64, 64)).embeds, dog.embeds)
    learned = conditioning(model, adapter, None, (64, 64)).embeds
    torch.testing.assert_close(learned, adapter.source["embeds"], atol=1e-5, rtol=1e-5)  # projected on itself


def test_prompts_are_read_by_the_adapters_text_encoder_and_tokens(model):
    adapter = random_adapter(model)
    rows = {"text_encoder": torch.ones(1, model.text_encoders[0].config.hidden_size)}
    both = replace(adapter, lora={**adapter.lora, **text_lora(model)}, concepts={"<thing>": rows})
    with torch.no_grad():
        dog = model.prompts(["a dog"]).embeds
    with applied(model, both):
        embeds = [conditioning(model, both, prompt, (64, 64)).embeds for prompt in ("a <thing>", "a dog")]
    assert not torch.allclose(*embeds, atol=1e-3) and not torch.allclose(embeds[1], dog, atol=1e-3)
    one, other = (
        drag_picture(model, picture(), [(20, 24), (36, 28)], mask=square(), prompt=prompt, adapter=both,
                     settings=SETTINGS).image.tobytes()
        for prompt in ("a <thing>", "a dog")
    )  # fmt: skip
    assert one != other
    with torch.no_grad():
        assert torch.equal(model.prompts(["a dog"]).embeds, dog)


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([], "there are no points"),
        ([(1, 1)], "1 points: every handle needs a target"),
        ([(1, 1), (2, 2), (3, 3)], "3 points: every handle needs a target"),
        ([(64, 1), (2, 2)], "handle 64,1 is outside the picture: it is 64×48 px, so x is 0 to 63 and y 0 to 47"),
        ([(1, 1), (2, 48.5)], "target 2,48.5 is outside"),
        ([(1, -1), (2, 2)], "handle 1,-1 is outside"),
        ([(float("nan"), 1), (2, 2)], "outside the picture"),
        ([1, 1, 2, 2], r"1 is no point: give \(x, y\) in pixels for each handle and each target"),
        ([(1, None), (2, 2)], r"\(1, None\) is no point"),
        ([(1, 1), (2, 2), (1, 1), (9, 9)], "one handle has two targets, 2,2 and 9,9: give it one of them"),
    ],
)
def test_points_that_make_no_pairs_in_the_picture_are_refused(points, message):
    with pytest.raises(UserError, match=message):
        handles_and_targets(points, (64, 48))


def test_a_mask_of_another_size_is_refused(model):
    with pytest.raises(UserError, match="the mask is 32×64 px, the picture 64×64"):
        drag_picture(model, picture(), [(1, 1), (9, 9)], mask=square(32, 64), settings=SETTINGS)


@pytest.mark.parametrize(("target", "said"), [((21.0, 24.0), True), ((20.0, 24.0), False), ((22.5, 24.0), False)])
def test_attentiondrag_d4_a_drag_under_half_a_cell_is_told(model, target, said):
    """Cells of four pixels: 1 px vanishes by rounding; 2.5 px go a whole cell; no length at all is meant."""
    found = drag_picture(model, picture(), [(20, 24), target], mask=square(), settings=SETTINGS)
    assert any("drag 1 is shorter than half a latent cell (a cell is 4 px)" in note for note in found.notes) == said


def test_a_handle_beside_the_mask_or_on_the_background_is_told(model):
    found = drag_picture(model, picture(), [(50, 56), (40, 50)], mask=square(), settings=SETTINGS)
    assert found.notes == ("handle 1 lies outside the mask",)
    pixels = replace(SETTINGS, method="pixels")
    found = drag_picture(model, picture(), [(50, 56), (40, 50)], mask=square(), settings=pixels)
    assert found.notes[:1] == ("handle 1 lies outside the mask",)
    found = drag_picture(model, picture(), [(20, 24), (30, 24)], mask=square(), settings=pixels)
    assert not any("outside the mask" in note for note in found.notes)
    grey = Image.new("RGB", (64, 64), (120, 130, 140))
    found = drag_picture(model, grey, [(30, 30), (40, 40)], settings=SETTINGS)
    assert found.drag.mask.sum() <= 0.4 * 256
    assert any("too large at threshold 0.3" in note and "give a mask" in note for note in found.notes)


@pytest.mark.parametrize("method", ["latents", "pixels"])
def test_where_a_handle_lies_is_said_by_pixels_of_the_photo_with_both_methods(model, method):
    """A photo that is dragged at half its size: the mask ends at its pixel 80."""
    photo, mask = picture().resize((128, 128)), Image.new("L", (128, 128))
    mask.paste(255, (16, 16, 80, 80))
    settings = replace(SETTINGS, method=method)
    for handle, said in (((79, 40), False), ((81, 40), True)):
        found = drag_picture(model, photo, [handle, (60, 60)], mask=mask, settings=settings, resolution=64)
        assert ("handle 1 lies outside the mask" in found.notes) == said


@pytest.mark.parametrize("target", [(16, 16, 32, 32), (0, 0, 8, 8)])
def test_a_region_that_is_made_smaller_does_not_leave_the_picture(model, target):
    """A box of half the side has a quarter of the area: it was said that more than half of it leaves the picture."""
    region = replace(SETTINGS, method="pixels", mode="region")
    found = drag_picture(model, picture(), [(8, 8, 40, 40), target], settings=region)
    assert not any("leaves the picture" in note for note in found.notes)


def test_a_thing_of_a_pixel_that_arrives_between_pixels_does_not_leave_the_picture(model):
    """It covers none of them by half, and was said to leave the picture."""
    mask, moved = square(200, 300, (4, 4, 10, 10)), replace(SETTINGS, method="pixels")  # 1.6 px of the frame
    found = drag_picture(model, picture(200, 300), [(6, 6), (9, 12)], mask=mask, settings=moved)
    assert not any("leaves the picture" in note for note in found.notes)


def test_what_leaves_the_picture_is_told(model):
    moved = replace(SETTINGS, method="pixels")
    found = drag_picture(model, picture(), [(20, 24), (63, 24)], mask=square(), settings=moved)
    assert "more than half of what moves leaves the picture" in found.notes


def test_a_picture_a_few_pixels_high_is_dragged_without_a_warning_of_torch(model):
    """No pixel around what is uncovered is left to be compared with."""
    strip = Image.effect_noise((2000, 16), 60).convert("RGB")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = drag_picture(model, strip, [(95, 2, 200, 14), (150, 2, 300, 14)], settings=replace(SETTINGS,
                             method="pixels", mode="region"), resolution=64).image  # fmt: skip
    assert drawn.size == strip.size and drawn.tobytes() != strip.tobytes()
