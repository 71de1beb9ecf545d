"""The judge measures what it claims, on whatever form of picture it is given."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from personalize.embedded.scenes import NOUNS, STYLES, Scene, SceneObject, random_scene, render
from tests.bench.judge import train as train_judge
from tests.bench.judge.accuracy import accuracy, compressed, judged_scene, softened
from tests.bench.judge.judge import (
    WEIGHTS,
    Judge,
    JudgeNet,
    Verdict,
    as_pixels,
    folded_state,
    object_crop,
    resized,
    save,
)
from tests.bench.judge.train import JudgeConfig

CAT_AND_DOG = Scene("beach", (SceneObject("cat", "3d", 0.26, 0.5, 0.4), SceneObject("dog", "flat", 0.74, 0.5, 0.4)))


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge.load()


def test_the_weights_are_small_and_their_measured_accuracy_is_high(judge):
    assert WEIGHTS.stat().st_size <= 5_000_000
    report = judge.info["report"]
    assert report["n"] >= 2000 and report["split"] == "judge-test"
    assert report["all"] >= 0.98
    assert judge.info["settings"]["train_split"] == "judge-train"


def test_held_out_renders_are_judged_right(judge):
    found = accuracy(judge, "judge-test", 100)
    assert found["all"] >= 0.97  # 99 % expected: more than 3 errors in 100 has a chance of 2 %, and the draw is fixed


def test_blurred_and_compressed_renders_are_judged_right(judge):
    found = accuracy(judge, "judge-test", 60, change=lambda images: compressed(softened(images)))
    assert found["all"] >= 0.95  # a blur of one pixel and JPEG at quality 40 may cost a few more


def test_every_kind_of_picture_gets_the_same_verdict(judge):
    image = render(CAT_AND_DOG, 128)[0]
    picture, pixels = Image.fromarray(image), as_pixels(image)
    first = judge(image)[0]
    for form in (image[None], picture, [picture], pixels, pixels[0]):
        (verdict,) = judge(form)
        assert verdict.noun_probs == pytest.approx(first.noun_probs, abs=1e-4)  # convolutions of another memory layout
        assert (verdict.nouns, verdict.background, verdict.style) == (first.nouns, first.background, first.style)


def test_a_verdict_names_what_is_there_and_where(judge):
    verdict: Verdict = judge(render(CAT_AND_DOG, 128)[0])[0]
    assert verdict.nouns == {"cat", "dog"} and verdict.background == "beach"
    for thing in CAT_AND_DOG.objects:
        assert verdict.places[thing.noun] == pytest.approx((thing.x, thing.y), abs=0.1)  # a cell of the grid is 0.125


def test_style_inside_looks_at_one_object_only(judge):
    image, masks = render(CAT_AND_DOG, 128)
    assert [judge.style_inside(image, mask) for mask in masks] == ["3d", "flat"]
    assert [judge.inside(image, mask).nouns for mask in masks] == [{"cat"}, {"dog"}]


def test_an_empty_picture_has_no_nouns(judge):
    assert judge(render(Scene("snow", ()), 128)[0])[0].nouns == frozenset()


def test_the_crop_is_square_and_centred_and_repeats_the_border():
    image = np.zeros((32, 48, 3), np.uint8)
    image[:8, :8] = 255
    mask = np.zeros((32, 48), bool)
    mask[:8, :8] = True
    crop = object_crop(image, mask)[0, 0]  # the object takes 8 of about 13 pixels, and white is repeated up and left
    assert crop.shape == (64, 64)
    assert crop[:40, :40].min() > 0.9 and crop[58:, 58:].max() < -0.9


@pytest.mark.parametrize("mask", [np.zeros((64, 64), bool), np.ones((32, 32), bool)])
def test_a_mask_that_fits_nothing_is_refused(mask):
    with pytest.raises(ValueError, match="mask"):
        object_crop(np.zeros((64, 64, 3), np.uint8), mask)


def test_pictures_of_the_wrong_kind_are_refused():
    with pytest.raises(ValueError, match="uint8"):
        as_pixels(np.zeros((2, 8, 8, 3)))


def test_folding_the_normalisation_changes_nothing():
    torch.manual_seed(0)
    net = JudgeNet((8, 8, 16))
    for _ in range(3):
        net(torch.randn(8, 3, 64, 64))  # gives the normalisation layers some statistics
    plain = JudgeNet((8, 8, 16), folded=True)
    plain.load_state_dict(folded_state(net.eval()))
    pixels = torch.randn(2, 3, 64, 64)
    for ours, theirs in zip(plain(pixels), net(pixels), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)  # another order of fp32 operations


def test_weights_for_other_labels_are_refused(tmp_path, monkeypatch):
    save(JudgeNet((8, 8, 16)), tmp_path / "judge.safetensors", {"widths": [8, 8, 16]})
    Judge.load(tmp_path / "judge.safetensors")
    monkeypatch.setattr("tests.bench.judge.judge.NOUNS", NOUNS[:-1])
    with pytest.raises(ValueError, match="nouns"):
        Judge.load(tmp_path / "judge.safetensors")


def test_the_scenes_to_learn_from_show_every_style_and_sometimes_nothing():
    scenes = [judged_scene("judge-train", index) for index in range(100)]
    assert {thing.style for scene in scenes for thing in scene.objects} == set(STYLES)
    assert sum(not scene.objects for scene in scenes) == 4


def test_splits_share_no_scene():
    splits = ("judge-train", "bench", "train")
    assert len({random_scene(seed, split=split) for split in splits for seed in range(100)}) == 300


@pytest.mark.parametrize("call", [3, 5])  # right after a checkpoint between the phases, and one within the second
def test_training_goes_on_where_it_was_interrupted(tmp_path, monkeypatch, call):
    unbroken, broken = (_miniature(tmp_path / name) for name in ("unbroken", "broken"))
    train_judge.main(unbroken)
    objective, calls = train_judge.objective, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == call:
            raise KeyboardInterrupt
        return objective(*args)

    monkeypatch.setattr(train_judge, "objective", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_judge.main(broken)
    monkeypatch.setattr(train_judge, "objective", objective)
    train_judge.main(broken)
    ours, theirs = (Judge.load(config.output).net.state_dict() for config in (broken, unbroken))
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], atol=0, rtol=0)  # the same numbers in the same order


def _miniature(folder) -> JudgeConfig:
    folder.mkdir()
    return JudgeConfig(
        output=folder / "judge.safetensors", run_dir=folder, train_split="tiny", test_split="tiny-test",
        widths=(8, 8, 16), scenes=12, test_scenes=4, max_train_steps=2, train_batch_size=6, checkpointing_steps=2,
        refining_scenes=6, refining_steps=3,
    )  # fmt: skip


def test_prepared_pictures_have_the_judges_size():
    assert resized(np.zeros((2, 128, 96, 3), np.uint8)).shape == (2, 3, 64, 64)
