"""Varied sprites: hue, shear and outline each do what they say, and captions stay true."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from personalize.embedded import scenes
from personalize.embedded.scenes import Scene, SceneObject, captions, random_scene, render, varied_scene
from personalize.embedded.variation import Variation, random_variation, vary


def square(colour=(255, 0, 0)) -> Image.Image:
    """A coloured square of 20 pixels in the middle of 40."""
    sprite = Image.new("RGBA", (40, 40))
    sprite.paste((*colour, 255), (10, 10, 30, 30))
    return sprite


def test_a_third_of_a_turn_makes_red_green_and_leaves_alpha():
    varied = np.asarray(vary(square(), Variation(hue=1 / 3)))
    red, green, blue, alpha = varied[20, 20]
    assert green == 255 and red <= 3 and blue <= 3 and alpha == 255  # PIL counts hues in 256ths of a turn
    assert np.array_equal(varied[..., 3], np.asarray(square())[..., 3])


def test_gray_has_no_hue():
    assert np.array_equal(np.asarray(vary(square((90, 90, 90)), Variation(hue=0.4))), np.asarray(square((90, 90, 90))))


@pytest.mark.parametrize("shear", [0.25, -0.25])
def test_a_shear_moves_the_upper_edge_against_the_lower_one(shear: float):
    alpha = np.asarray(vary(square(), Variation(shear=shear)))[..., 3] / 255
    assert alpha.shape[0] == 20 and 25 <= alpha.shape[1] <= 27, "a quarter of the height wider, and no empty border"
    centres = [float((row * np.arange(alpha.shape[1])).sum() / row.sum()) for row in (alpha[2], alpha[17])]
    assert centres[0] - centres[1] == pytest.approx(15 * shear, abs=0.1)  # 15 rows apart; the filter is bilinear
    assert alpha.sum() == pytest.approx(400, abs=4)


def test_an_outline_is_as_wide_as_asked_and_the_sprite_is_left_alone():
    outlined = np.asarray(vary(square(), Variation(outline=0.05, outline_colour=(255, 255, 255))))
    assert outlined.shape == (44, 44, 4) and (outlined[..., 3] == 255).sum() == 24 * 24
    assert (outlined[12:32, 12:32, :3] == (255, 0, 0)).all() and (outlined[10, 20, :3] == 255).all()


def test_numbers_out_of_range_are_refused():
    for wrong in ({"hue": 0.6}, {"shear": -0.3}, {"outline": 0.06}, {"outline": -0.01}):
        with pytest.raises(ValueError, match="within"):
            Variation(**wrong)


def test_random_variations_cover_their_ranges():
    drawn = [random_variation(np.random.default_rng(seed)) for seed in range(200)]
    assert len(set(drawn)) == 200 and {v.outline_colour for v in drawn} == {(0, 0, 0), (255, 255, 255)}
    assert 0.55 < np.mean([v.outline > 0 for v in drawn]) < 0.78  # two thirds, four standard deviations of 200
    assert min(v.hue for v in drawn) < -0.4 and max(v.shear for v in drawn) > 0.2


def test_a_varied_scene_keeps_its_arrangement_and_loses_the_name_of_its_style():
    scene = random_scene(3, objects=2)
    varied = varied_scene(scene, 3)
    assert varied == varied_scene(scene, 3) != varied_scene(scene, 4)
    assert [(t.noun, t.x, t.y, t.size) for t in varied.objects] == [(t.noun, t.x, t.y, t.size) for t in scene.objects]
    named = tuple(scenes.STYLES.values())
    assert any(text.startswith(named) for text in captions(scene))
    assert captions(varied) == tuple(text for text in captions(scene) if not text.startswith(named))


def test_a_varied_object_is_drawn_varied_and_at_its_size():
    plain = SceneObject("apple", "3d", size=0.5)
    varied = SceneObject("apple", "3d", size=0.5, variation=Variation(hue=0.5, shear=0.2, outline=0.05))
    (first, (mask,)), (second, (other,)) = (render(Scene("white", (thing,)), 96) for thing in (plain, varied))
    assert first[mask][:, 0].mean() > first[mask][:, 2].mean(), "an apple is red"
    assert second[other][:, 0].mean() < second[other][:, 2].mean(), "half a turn further it is not"
    longest = max(np.ptp(np.flatnonzero(other.any(0))), np.ptp(np.flatnonzero(other.any(1)))) + 1
    assert longest == pytest.approx(48, abs=2)  # half of 96; the antialiased rim counts as less than half covered
