"""The judge of likeness: its views, its loss, its training, and what the shipped weights can tell apart."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from personalize.embedded.scenes import Scene, SceneObject, render
from personalize.embedded.variation import Variation
from tests.bench.judge import train_likeness
from tests.bench.judge.likeness import WEIGHTS, Likeness, LikenessNet, save
from tests.bench.judge.train_likeness import SPRITES, LikenessConfig, accuracy, batch, triplet_loss, view, view_scene

SMALL: dict[str, Any] = {"views": 4, "test_views": 2, "nouns_per_batch": 2, "views_per_sprite": 2}


@pytest.fixture(scope="module")
def likeness() -> Likeness:
    return Likeness.load()


def test_the_weights_are_small_and_tell_subjects_apart(likeness):
    assert WEIGHTS.stat().st_size <= 1_500_000
    report = likeness.info["report"]
    assert report["split"] == "likeness-test" and report["sprites"] == len(SPRITES) and report["n"] >= 5000
    assert report["any"] >= 0.99


def test_the_same_subject_elsewhere_is_more_alike_than_another(likeness):
    before = Scene("red", (SceneObject("cat", "flat", 0.4, 0.5, 0.5),))
    moved = Scene("beach", (SceneObject("dog", "3d", 0.8, 0.5, 0.3), SceneObject("cat", "flat", 0.3, 0.4, 0.4, 8.0)))
    others = [before.with_object(0, noun=noun) for noun in ("dog", "fox", "tiger")] + [before.with_style("drawing")]
    photo, (mask,) = render(before, 128)
    again, masks = render(moved, 128)
    same = likeness(photo, mask, again, masks[1])
    for other in others:
        picture, (place,) = render(other, 128)
        assert same > likeness(photo, mask, picture, place)
    assert likeness(photo, mask, photo, mask) == pytest.approx(1, abs=1e-5)
    with pytest.raises(ValueError, match="empty"):
        likeness(photo, np.zeros_like(mask), again, masks[1])


def test_a_view_shows_its_sprite_in_front_and_splits_differ():
    scenes = [view_scene(SPRITES[5], number, "likeness-train") for number in range(40)]
    for scene, which in scenes:
        thing = scene.objects[which]
        assert (thing.noun, thing.style) == SPRITES[5] and which == len(scene.objects) - 1
        assert isinstance(thing.variation, Variation) and abs(thing.variation.hue) <= train_likeness.MAX_HUE
    assert 0.1 < np.mean([which for _, which in scenes]) < 0.7  # 0.4 have a neighbour, four standard deviations of 40
    first = view(SPRITES[5], 0, "likeness-train")
    assert first.shape == (64, 64, 3) and np.array_equal(first, view(SPRITES[5], 0, "likeness-train"))
    assert not np.array_equal(first, view(SPRITES[5], 0, "likeness-test"))


def test_the_loss_is_of_triplets():
    """Two sprites of two views: one pair of each is at cosine 1, every other at 0, but for one negative at 0.5."""
    east, north = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, 0.0])
    perfect = triplet_loss(torch.stack([east, east, north, north]), 2)
    assert perfect.item() == pytest.approx(math.log1p(math.exp(-10)), rel=1e-3)
    mixed = triplet_loss(torch.stack([east, north, east, north]), 2)
    assert mixed.item() == pytest.approx(math.log1p(math.exp(10)), rel=1e-3), (
        "the nearest other is nearer than the same"
    )


def test_batches_hold_two_styles_of_each_noun_and_depend_on_the_update_alone():
    config = LikenessConfig(**SMALL)
    views = np.zeros((len(SPRITES), 4, 64, 64, 3), np.uint8)
    views += np.arange(len(SPRITES), dtype=np.uint16).astype(np.uint8)[:, None, None, None, None]
    pixels = batch(config, views, 3)
    assert pixels.shape == (8, 3, 64, 64) and torch.equal(pixels, batch(config, views, 3))
    assert not torch.equal(pixels, batch(config, views, 4))


def test_training_resumes_exactly(tmp_path, monkeypatch):
    drawn = np.random.default_rng(0).integers(0, 256, (len(SPRITES), 4, 64, 64, 3), dtype=np.uint8)
    monkeypatch.setattr(train_likeness, "views_of", lambda config, split, count: drawn[:, :count])
    monkeypatch.setattr(train_likeness, "accuracy", lambda likeness, views: {"shape": views.shape})
    whole = LikenessConfig(
        tmp_path / "a.safetensors", tmp_path / "whole", max_train_steps=4, checkpointing_steps=1, **SMALL
    )
    assert train_likeness.main(whole) == {"shape": (len(SPRITES), 2, 64, 64, 3)}
    assert Likeness.load(whole.output).info["settings"]["max_train_steps"] == 4
    parts = replace(whole, output=tmp_path / "b.safetensors", run_dir=tmp_path / "parts")

    def interrupted(config, views, update):
        if update == 2:
            raise KeyboardInterrupt
        return batch(config, views, update)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_likeness, "batch", interrupted)
        train_likeness.main(parts)
    train_likeness.main(parts)
    first, second = (Likeness.load(run.output).net.state_dict() for run in (whole, parts))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_saved_weights_embed_like_the_network_they_are_of(tmp_path):
    torch.manual_seed(0)
    net = LikenessNet((8, 8, 8))
    crops = torch.rand(4, 3, 64, 64) * 2 - 1
    for _ in range(3):
        net(crops)  # running means for the normalisation layers
    save(net.eval(), tmp_path / "net.safetensors", {"widths": [8, 8, 8]})
    loaded = Likeness.load(tmp_path / "net.safetensors").embed(crops)
    torch.testing.assert_close(loaded, net(crops), rtol=0, atol=5e-3)  # half precision, normalisation folded
    torch.testing.assert_close(loaded.norm(dim=1), torch.ones(4))


def test_accuracy_counts_each_kind_of_other():
    class Fixed(Likeness):
        """Embeds by noun alone: another style of a noun is the same to it."""

        def __init__(self) -> None:
            pass

        def embed(self, crops):
            nouns = sorted({noun for noun, _ in SPRITES})
            table = torch.eye(len(nouns))[[nouns.index(noun) for noun, _ in SPRITES]]
            return table.repeat_interleave(len(crops) // len(SPRITES), 0)

    found = accuracy(Fixed(), np.zeros((len(SPRITES), 2, 64, 64, 3), np.uint8))
    assert found["same style"] == 1 and found["same noun"] == 0 and 0.97 < found["any"] < 1
    assert found["n"] == 2 * len(SPRITES)
