"""The bench of single-image edits in miniature, and the paper's full-weight recipe it compares with."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from personalize.adapters.adapter import Adapter
from personalize.adapters.forgetting import parse_rule_sum
from personalize.adapters.lora import module_names
from personalize.evaluation.scene_scorer import SceneScorer, ScorerNet
from personalize.models.stable_diffusion import Conditioning
from personalize.randomness import generator
from tests.bench import frontier, single_image
from tests.bench.full_weights import full_weights_applied, learn_full, trained_names
from tests.bench.judge import judge
from tests.bench.single_image import (
    AUTO,
    BOTH,
    DECODER,
    ENCODER,
    KINDS,
    NONE,
    RULES,
    SingleImageBench,
    grid_of,
    run,
    spread,
)  # fmt: skip
from tests.support.tiny import tiny

BATCH = generator(0, "test/pixels")


@pytest.fixture(scope="module")
def model():
    return tiny("sd1")


@pytest.fixture(scope="module")
def learned(model):
    pixels = torch.rand(1, 3, 64, 64, generator=BATCH) * 2 - 1
    return learn_full(model, pixels, "a photo of a cat", 1e-3, samples=4, batch=2)


def output(model, conditioning=None):
    noise = torch.randn(1, 4, 16, 16, generator=generator(1, "test/latents"))
    with torch.no_grad():
        return model.predict(noise, 300, conditioning or model.prompts(["a cat"]))


@pytest.mark.skipif(not judge.WEIGHTS.is_file(), reason="the judge's weights are not here")
@pytest.mark.slow
def test_a_scene_is_measured_resumed_and_tabled(tmp_path, monkeypatch, model):
    torch.manual_seed(0)
    scorer = SceneScorer(ScorerNet((8, 8, 8)), {})
    options = SingleImageBench(
        model=tmp_path, output_dir=tmp_path / "out", scenes=1, budget=1, steps=1, samples=10, paper_rates=(1e-4,),
        nouns=("cat", "dog"), variants=(BOTH,),
    )  # fmt: skip
    text = run(options, model, scorer)
    for arm in (NONE, DECODER, ENCODER, AUTO, "paper, rate 0.0001", "do nothing", "base without adapter"):
        assert f"| background | {arm} | 1 |" in text
    assert "| --auto | no forgetting | 3 |" in text and "Reconstruction, PSNR dB: autoencoder" in text
    assert f"| {BOTH}, {DECODER} | {DECODER} | 1 |" in text and "On the frontier of success and identity: " in text
    assert all((tmp_path / "out" / name).is_file() for name in ("sheet.png", "frontier.png"))
    assert Adapter.load(tmp_path / "out/adapters/scene-0-timestep-rank-and-orthogonal-start").timestep_rank is not None
    found = json.loads((tmp_path / "out" / "figures.json").read_text())
    assert len(found["edits"]) == 9 * 3 and {"LoRA", "paper, rate 0.0001"} <= set(found["replays"][0])
    monkeypatch.setattr(single_image, "learn", lambda *_: pytest.fail("learned again"))
    monkeypatch.setattr(single_image, "learn_full", lambda *_: pytest.fail("learned again"))
    assert run(options, model, scorer) == text


def test_an_arm_is_dominated_by_one_that_is_no_worse_in_both():
    arms = {"a": (50.0, 20.0), "b": (70.0, 18.0), "c": (50.0, 19.0), "d": (70.0, 18.0)}
    assert frontier.dominated(arms) == {"c": "a"}, "b and d are equal: neither is better"
    text = frontier.summary(arms)
    assert "On the frontier of success and identity: b (70 %, 18.0 dB), d (70 %, 18.0 dB), a" in text
    assert "Dominated: c (by a)." in text


def test_what_two_arms_reach_in_turn_lies_between_them():
    success, identity = np.array([[90.0, 40.0, 50.0]]), np.array([[17.0, 23.0, 19.0]])
    reached = [float(frontier.at_identity(success, identity, np.array([at]))[0]) for at in (16, 17, 20, 23, 24)]
    assert reached == [90, 90, 65, 40, -np.inf]
    rows = [
        {"arm": arm, "task": f"{kind}/{scene}", "success": good, "psnr": identity}
        for arm, identity, goods in (("a", 20.0, (1, 1, 1, 0)), ("b", 22.0, (0, 0, 1, 0)), ("c", 18.0, (1, 1, 0, 0)))
        for (kind, scene), good in zip((("x", 0), ("y", 0), ("x", 1), ("y", 1)), goods, strict=True)
    ]
    value, low, high, n = frontier.above_mixtures(rows, "a", ["b", "c"])
    assert (value, n) == (75 - 0.5 * (25 + 50), 4)
    # scene 0 alone: 100 against (0 + 100) / 2; scene 1 alone: 50 against b's own 50
    assert (low, high) == (0, 50)


def test_every_kind_of_edit_has_the_same_scene_before(tmp_path, model):
    if not judge.WEIGHTS.is_file():
        pytest.skip("the judge's weights are not here")
    options = SingleImageBench(model=tmp_path, output_dir=tmp_path, nouns=("cat", "dog"))
    bench = single_image.Bench(options, model, SceneScorer(ScorerNet((8, 8, 8)), {}))
    assert len({bench.task(kind, 3).before for kind in KINDS}) == 1
    assert {thing.style for thing in bench.task("style", 3).before.objects} == {"flat"}


def test_every_arm_has_the_same_number_of_pictures_and_seeds_of_its_own():
    for name in RULES:
        drawn = spread(grid_of(name), 8)
        assert len(drawn) == 8 and len({seed for _, seed in drawn}) == 8 and len(set(drawn)) == 8
        assert {setting.forget for setting, _ in drawn} == set(RULES[name])


def test_forgedit_the_papers_parameters_are_those_of_the_lora_set_with_norms_and_biases(model):
    names = trained_names(model.unet)
    modules = {name.rpartition(".")[0] for name in names}
    assert set(module_names(model.unet, "sd1")) <= modules
    assert {name.split(".")[0] + "." + name.split(".")[1] for name in names} == {
        "down_blocks.1", "down_blocks.2", "down_blocks.3", "up_blocks.1", "up_blocks.2", "up_blocks.3"
    }  # fmt: skip
    assert any(".norm" in name for name in names) and any(name.endswith(".bias") for name in names)


def test_full_weights_are_worn_forgotten_and_taken_off(model, learned):
    before = output(model)
    with full_weights_applied(model, learned):
        whole = output(model)
    with full_weights_applied(model, learned, parse_rule_sum("encoder+decoder")):
        nothing = output(model)
    with full_weights_applied(model, learned, parse_rule_sum("decoder")):
        half = output(model)
    assert torch.equal(before, output(model)), "no trace"
    assert torch.equal(before, nothing), "both sides forgotten is the base, for the middle was not trained"
    assert not torch.equal(before, whole) and not torch.equal(half, whole) and not torch.equal(half, before)
    assert not any(parameter.requires_grad for parameter in model.unet.parameters())


def test_full_weights_move_the_embedding_at_its_own_rate(model, learned):
    with torch.no_grad():
        start = model.prompts(["a photo of a cat"]).embeds
    moved = (learned.source["embeds"] - start).abs()
    assert 1e-4 < float(moved.max()) <= 2.1e-3  # two updates of Adam at 1e-3
    assert output(model, Conditioning(learned.source["embeds"])).shape == (1, 4, 16, 16)
