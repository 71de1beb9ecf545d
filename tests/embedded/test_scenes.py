"""The scenes: values, drawn deterministically, with exact masks and true captions; a style held out of all training."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from personalize.embedded import backgrounds, scenes
from personalize.embedded.scenes import Scene, SceneObject, captions, random_scene, render

CAT = Scene("beach", (SceneObject("cat", "3d", 0.4, 0.5, 0.5, 7.0, True),))
PAIR = Scene("red", (SceneObject("dog", "drawing", 0.75, 0.5, 0.4), SceneObject("cat", "drawing", 0.25, 0.5, 0.4)))


def hashes(style: str) -> dict[str, str]:
    """SHA-256 of file and of decoded pixels of every sprite of `style` → its noun."""
    found = {}
    for path in sorted((scenes.SPRITES / style).glob("*.webp")):
        with Image.open(path) as image:
            pixels = image.convert("RGBA")
        for content in (path.read_bytes(), repr(pixels.size).encode() + pixels.tobytes()):
            found[hashlib.sha256(content).hexdigest()] = path.stem
    return found


def test_world_is_large_enough():
    assert len(scenes.COLOURS) >= 12 and len(scenes.PLACES) >= 8
    assert len(set(scenes.NOUNS)) == len(scenes.NOUNS) == 73
    assert len(set(scenes.BACKGROUNDS)) == len(scenes.COLOURS) + len(scenes.PLACES)


@pytest.mark.parametrize("style", scenes.STYLES)
def test_every_noun_has_its_sprite(style: str):
    missing = [noun for noun in scenes.NOUNS if not scenes.sprite_path(noun, style).is_file()]
    assert len(missing) <= (1 if style == "modern" else 0)


def test_random_scene_is_determined_by_its_seed():
    assert [random_scene(seed) for seed in range(50)] == [random_scene(seed) for seed in range(50)]
    assert len({random_scene(seed) for seed in range(50)}) == 50


def test_splits_are_disjoint():
    train = {random_scene(seed) for seed in range(400)}
    assert not train & {random_scene(seed, split="test") for seed in range(400)}


def test_render_is_deterministic_also_with_cold_caches():
    first, first_masks = render(CAT, 96)
    scenes._sprite.cache_clear()
    backgrounds.paint_background.cache_clear()
    again, again_masks = render(CAT, 96)
    assert np.array_equal(first, again) and np.array_equal(first_masks[0], again_masks[0])
    assert first.shape == (96, 96, 3) and first.dtype == np.uint8 and first_masks[0].dtype == bool


@pytest.mark.parametrize("background", scenes.BACKGROUNDS)
def test_every_background_is_its_own(background: str):
    picture = backgrounds.paint_background(background, 32)
    assert picture.shape == (32, 32, 3) and picture.min() >= 0 and picture.max() <= 1
    others = [backgrounds.paint_background(other, 32) for other in scenes.BACKGROUNDS if other != background]
    assert min(float(np.abs(picture - other).mean()) for other in others) > 0.01


def test_mask_is_exactly_where_the_object_covers_the_background():
    """Where the sprite and its shadow are absent the bare background shows, where it is solid the sprite does."""
    mask = render(CAT, 64)[1][0]
    alpha = scenes._render_object(CAT.objects[0], 64)[1]
    assert np.array_equal(mask, alpha > 0.5) and 0.02 < mask.mean() < 0.5
    bare = backgrounds.paint_background("beach", 64)
    shown = render(CAT, 64)[0] / 255
    untouched = (alpha == 0) & (scenes._shadow(alpha) == 0)
    assert np.abs(shown - bare)[untouched].max() <= 0.5 / 255 + 1e-6  # rounding to 8 bits
    solid = alpha == 1
    art = scenes._render_object(CAT.objects[0], 64)[0]
    assert solid.any() and np.abs(shown - art)[solid].max() <= 0.5 / 255 + 1e-6


def test_mask_of_a_hidden_object_loses_what_is_in_front_of_it():
    back, front = SceneObject("cat", "3d", 0.45, 0.5, 0.5), SceneObject("dog", "3d", 0.6, 0.5, 0.5)
    behind, before = render(Scene("blue", (back, front)), 64)[1]
    alone = render(Scene("blue", (back,)), 64)[1][0]
    assert not (behind & before).any() and np.array_equal(behind, alone & ~before) and behind.sum() < alone.sum()


def test_captions_of_one_object():
    styled, unstyled, plain = captions(CAT)
    assert styled == f"{scenes.STYLES['3d']} a cat on the beach" and plain == "a cat on the beach"
    assert unstyled == f"{scenes.ANY_STYLE} a cat on the beach"
    lengths = {len(phrase.split()) for phrase in (scenes.ANY_STYLE, *scenes.STYLES.values())}
    assert len(lengths) == 1  # so that changing or dropping the style leaves every other word in its place


def test_captions_of_two_objects_name_left_and_right_as_they_stand():
    texts = captions(PAIR)
    assert texts[0] == f"{scenes.STYLES['drawing']} a cat and a dog on a red background"
    assert "a dog and a cat on a red background" in texts
    assert "a cat on the left and a dog on the right on a red background" in texts
    assert not any("a dog on the left" in text for text in texts) and len(set(texts)) == len(texts)


@pytest.mark.parametrize(
    ("noun", "phrase"), [("owl", "an owl"), ("coffee_cup", "a coffee cup"), ("glasses", "glasses")]
)
def test_noun_phrase(noun: str, phrase: str):
    assert scenes.noun_phrase(noun) == phrase


def test_an_edit_is_another_scene():
    assert CAT.with_background("snow") == Scene("snow", CAT.objects)
    assert CAT.with_object(0, noun="dog").objects[0].noun == "dog"
    assert PAIR.with_style("modern").objects[1].style == "modern"
    moved = CAT.with_object_shifted(0, 0.25, -0.125)
    assert (moved.objects[0].x, moved.objects[0].y) == (0.65, 0.375)
    assert CAT.background == "beach" and CAT.objects[0].noun == "cat"  # the original is what it was


def test_moving_by_whole_pixels_moves_the_mask_by_as_many():
    before = render(CAT, 64)[1][0]
    after = render(CAT.with_object_shifted(0, 8 / 64, -4 / 64), 64)[1][0]
    assert np.array_equal(np.roll(before, (-4, 8), (0, 1)), after)


def test_changing_the_background_keeps_the_object():
    first, masks = render(CAT, 64)
    second, masks_again = render(CAT.with_background("night"), 64)
    inside = scenes._render_object(CAT.objects[0], 64)[1] == 1
    assert np.array_equal(masks[0], masks_again[0])
    assert np.array_equal(first[inside], second[inside]) and not np.array_equal(first[~masks[0]], second[~masks[0]])


def test_objects_lie_in_the_frame():
    for seed in range(200):
        for thing in random_scene(seed).objects:
            # an upright sprite lies within its frame; one turned by ±10° may reach over it by a hair
            assert thing.size / 2 <= thing.x <= 1 - thing.size / 2 and thing.size / 2 <= thing.y <= 1 - thing.size / 2


def test_held_out_style_is_never_drawn():
    assert scenes.HELD_OUT_STYLE not in scenes.TRAINING_STYLES
    drawn = {thing.style for seed in range(500) for thing in random_scene(seed).objects}
    assert drawn == set(scenes.TRAINING_STYLES)


def test_no_sprite_of_the_held_out_style_occurs_in_a_training_style():
    held_out = hashes(scenes.HELD_OUT_STYLE)
    assert len(held_out) == 2 * 73
    for style in scenes.TRAINING_STYLES:
        known = hashes(style)
        assert len(known) >= 2 * 72 and not set(held_out) & set(known)


def test_the_art_carries_its_attributions():
    for path in (scenes.SPRITES / "README.md", Path(__file__).parents[2] / "THIRD_PARTY_NOTICES.md"):
        text = path.read_text(encoding="utf-8")
        for name in ("Microsoft", "MIT", "Noto Emoji", "Apache", "OFL|Open Font", "Twemoji", r"CC-BY 4\.0", "Twitter"):
            assert re.search(name, text), (path, name)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Scene("moon", CAT.objects), r"unknown background 'moon': choose one of red, .*bricks"),
        (lambda: SceneObject("cat", "oil"), r"unknown style 'oil': choose one of 3d, drawing, modern, flat"),
        (lambda: SceneObject("unicorn", "3d"), r"no sprite of a 'unicorn' in style '3d'; nouns: airplane, .*wolf"),
        (lambda: random_scene(0, objects=3), r"one or two objects, got 3"),
    ],
)
def test_mistakes_are_answered_with_the_choices(make, says: str):
    with pytest.raises(ValueError, match=says):
        make()
