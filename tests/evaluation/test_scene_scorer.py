"""The package's scorer: it reads prompts, it knows held-out renders, and it shares nothing with the judge."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from personalize.embedded.scenes import STYLES, Scene, SceneObject, captions, random_scene, render
from personalize.errors import UserError
from personalize.evaluation.scene_scorer import WEIGHTS, SceneScorer, ScorerNet, parse_prompt, save
from personalize.evaluation.scoring import Request
from personalize.training.pretraining.scorer import accuracy
from tests.bench.judge import judge

CAT = Scene("grass", (SceneObject("cat", "flat", 0.5, 0.5, 0.6),))
there = pytest.mark.skipif(not WEIGHTS.is_file(), reason="the scorer's weights are not here")


@pytest.fixture(scope="module")
def scorer():
    return SceneScorer.load()


def picture(scene: Scene) -> Image.Image:
    return Image.fromarray(render(scene, 128)[0])


def read(scorer, scene: Scene, prompt: str, caption: str = "a picture of a cat on the grass", source: Scene = CAT):
    return scorer([picture(scene)], Request(prompt, caption, picture(source)))[0]


@pytest.mark.parametrize(
    ("text", "nouns", "background", "style"),
    [
        ("a drawing of two cats in the snow", {"cat"}, "snow", "drawing"),
        ("a picture of a coffee cup on an orange background", {"coffee_cup"}, "orange", None),
        ("A photo of a snowman and an owl by a brick wall", {"snowman", "owl"}, "bricks", None),
        ("an orange fruit on a wooden table", {"orange_fruit"}, "wood", None),
        ("watermelon in the water", {"watermelon"}, "water", None),
        ("glasses on the beach", {"glasses"}, "beach", None),
        ("a stone lion", {"lion"}, None, None),
        ("something else", set(), None, None),
    ],
)
def test_words(text, nouns, background, style):
    found = parse_prompt(text)
    assert (found.nouns, found.background, found.style) == (nouns, background, style)


def test_every_caption_of_a_scene_says_what_is_in_it():
    for seed in range(60):
        scene = random_scene(seed, split="words", styles=tuple(STYLES))
        styled, *others = captions(scene)
        for text in (styled, *others):
            found = parse_prompt(text)
            assert found.nouns == {thing.noun for thing in scene.objects} and found.background == scene.background
        assert parse_prompt(styled).style == scene.objects[0].style


@there
def test_it_is_small_and_shares_no_data_and_no_weights_with_the_judge(scorer):
    assert WEIGHTS.stat().st_size <= 3_000_000
    settings = scorer.info["settings"]
    assert settings["train_split"] == "scorer-train" and settings["test_split"] == "scorer-test"
    if judge.WEIGHTS.is_file():
        other = judge.Judge.load().info["settings"]
        assert settings["train_split"] not in (other["train_split"], other["test_split"])
        assert settings["seed"] != other["seed"] and settings["widths"] != other["widths"]


@there
def test_held_out_renders_are_read_right(scorer):
    assert scorer.info["report"]["rendered"]["n"] >= 500
    found = accuracy(scorer, "scorer-test", 60)
    assert found["nouns"] >= 0.9 and found["background"] >= 0.95  # of 60; the file's report has the figures of 1000


@there
@pytest.mark.parametrize(
    ("after", "prompt"),
    [
        (CAT.with_background("beach"), "a picture of a cat on the beach"),
        (CAT.with_object(0, noun="dog"), "a picture of a dog on the grass"),
        (CAT.with_style("drawing"), "a drawing of a cat on the grass"),
    ],
)
def test_the_true_result_of_an_edit_beats_the_source_and_another_scene(scorer, after, prompt):
    truth, source = read(scorer, after, prompt), read(scorer, CAT, prompt)
    other = read(scorer, Scene("night", (SceneObject("car", "3d", 0.4, 0.6, 0.5),)), prompt)
    assert truth.edit > 0.5 > source.edit and truth.score > max(source.score, other.score)
    assert truth.identity > 0.6 > other.identity, "what the prompt does not change counts, wherever it lies"
    assert source.distance == pytest.approx(0, abs=1e-5) and source.distance < scorer.copy_distance
    assert other.identity < 1 - scorer.lost_distance


@there
def test_a_prompt_of_another_world_is_refused(scorer):
    with pytest.raises(UserError, match="knows no word"):
        read(scorer, CAT, "a castle")


def test_weights_of_another_world_are_refused(tmp_path, monkeypatch):
    path = save(ScorerNet((8, 8, 8)), tmp_path / "scorer.safetensors", {"widths": [8, 8, 8]})
    assert SceneScorer.load(path).info["widths"] == [8, 8, 8]
    monkeypatch.setattr("personalize.evaluation.scene_scorer.NOUNS", ("cat",))
    with pytest.raises(UserError, match="another world"):
        SceneScorer.load(path)


def test_the_grid_is_that_of_the_labels():
    things, places, fine, coarse = ScorerNet((8, 16, 24))(torch.zeros(1, 3, 64, 64))
    assert things.shape == (1, 73 * 4, 8, 8) and places.shape == (1, 20, 8, 8)
    assert fine.shape == (1, 16, 16, 16) and coarse.shape == (1, 24, 8, 8)
