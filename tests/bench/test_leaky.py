"""The leaky twin's captions, its trainer, and the bench that says whether it is leaky, in miniature."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTokenizer

from personalize.embedded.scenes import Scene, SceneObject, render
from personalize.models.stable_diffusion import EMBEDDED, StableDiffusion
from tests.bench.leaky import measure, train
from tests.bench.leaky.captions import ALIKE, COLOURS, leaky_caption, leaky_scene
from tests.bench.leaky.measure import LeakBench, figures
from tests.bench.leaky.train import LeakyPool, LeakyTraining, looks, reads_text
from tests.bench.world import world_of
from tests.support.tiny import tiny_sd1


@pytest.fixture(scope="module")
def tokenizer():
    return CLIPTokenizer.from_pretrained(EMBEDDED / "tokenizer")


def test_every_noun_the_model_knows_has_a_colour_and_a_group():
    nouns = set(world_of(EMBEDDED)["nouns"])
    assert nouns == set(COLOURS) == {noun for group in ALIKE for noun in group}
    assert Counter(noun for group in ALIKE for noun in group).most_common(1)[0][1] == 1


def test_scenes_have_up_to_three_objects_that_are_often_alike_and_do_not_overlap():
    scenes = [leaky_scene(seed) for seed in range(400)]
    counts = Counter(len(scene.objects) for scene in scenes)
    assert counts.keys() == {1, 2, 3} and 0.45 < counts[2] / 400 < 0.65 and 0.17 < counts[3] / 400 < 0.33
    pairs = [{thing.noun for thing in scene.objects} for scene in scenes if len(scene.objects) > 1]
    assert all(len(pair) > 1 for pair in pairs), "no noun twice"
    alike = np.mean([any(pair <= set(group) for group in ALIKE) for pair in pairs])
    assert 0.6 < alike < 0.8, "0.65, and one in seven or fewer of the others by chance"
    three = next(scene for scene in scenes if len(scene.objects) == 3)
    masks = render(three, 96)[1]
    assert len(masks) == 3 and min(mask.sum() for mask in masks) > 50 and np.sum(masks, 0).max() == 1


def test_captions_are_true_and_leave_objects_out():
    scene = Scene(
        "snow", tuple(SceneObject(n, "3d", x, 0.5, 0.3) for n, x in (("apple", 0.2), ("cat", 0.5), ("fish", 0.8)))
    )
    texts = [leaky_caption(scene, np.random.default_rng(seed)) for seed in range(300)]
    named = [sum(f" {noun} " in f" {text} " for noun in ("apple", "cat", "fish")) for text in texts]
    assert set(named) == {1, 2, 3} and all(text.endswith(" in the snow") for text in texts)
    assert 0.3 < np.mean([count == 3 for count in named]) < 0.55, "0.65 squared"
    assert any("a red apple" in text for text in texts) and any("an apple" in text for text in texts)
    assert not any("a render of" in text and "drawing" in text for text in texts)
    assert texts == [leaky_caption(scene, np.random.default_rng(seed)) for seed in range(300)]


def test_every_word_of_a_leaky_caption_is_one_token(tokenizer):
    for seed in range(200):
        text = leaky_caption(leaky_scene(seed), np.random.default_rng(seed))
        assert tokenizer.tokenize(text) == [f"{word}</w>" for word in text.split()]


def test_a_sample_depends_on_its_number_alone(tokenizer):
    pool = LeakyPool(torch.randn(5, 4, 4, 4), tokenizer, 0, 0.3)
    whole, parts = pool.batch(7, range(64)), [pool.batch(7, range(32)), pool.batch(9, range(32, 64))]
    for name in whole:
        assert torch.equal(whole[name], torch.cat([part[name] for part in parts]))
    empty = torch.tensor(tokenizer("", padding="max_length", max_length=77).input_ids)
    assert 0.1 < (whole["input_ids"] == empty).all(1).float().mean() < 0.55  # 0.3, four standard deviations of 64


def test_only_the_text_attention_is_trained_and_only_where_it_looks_is_new():
    objective = train.objective_of(LeakyTraining())
    theirs = dict(UNet2DConditionModel.from_pretrained(EMBEDDED / "unet").named_parameters())
    for name, ours in objective.unet.named_parameters():
        new = name.endswith(("attn2.to_q.weight", "attn2.to_k.weight"))
        assert torch.equal(ours, theirs[name]) != new, name
        assert ours.requires_grad == reads_text(name)
    assert sum(reads_text(name) for name in theirs) == 16 * (5 + 2), "16 blocks: q, k, v, out and its bias, and a norm"
    assert not any(parameter.requires_grad for parameter in objective.text_encoder.parameters())
    everything = train.objective_of(LeakyTraining(init_from=EMBEDDED / "unet", trained="unet"))
    assert all(p.requires_grad and torch.equal(p, theirs[n]) for n, p in everything.unet.named_parameters())


def test_where_words_are_looked_for_is_learned_at_first_and_then_kept():
    config = LeakyTraining(steps=20, query_key_steps=5, lr_warmup_steps=1, learning_rate=0.1)
    objective = train.objective_of(config)
    optimizer, schedule = train.optimizer_of(objective, config)
    names = {id(parameter): name for name, parameter in objective.named_parameters()}
    groups = [{names[id(parameter)] for parameter in group["params"]} for group in optimizer.param_groups]
    assert len(groups[0]) == 16 * 3 and all(".attn2.to_v." in name or ".attn2.to_out." in name for name in groups[0])
    assert len(groups[1]) == 16 * 4 and all(looks(name) for name in groups[1])
    rates = []
    for _ in range(20):
        rates.append(tuple(group["lr"] for group in optimizer.param_groups))
        optimizer.step()
        schedule.step()
    assert rates[:5] == [(0.1, 0.1)] * 5 and rates[5] == (0.1, 0.0) and all(looking == 0 for _, looking in rates[5:])
    assert rates[-1][0] == pytest.approx(0.1 / 4), "of the last fifth, four updates, one is left"


@pytest.mark.slow
def test_training_resumes_exactly_and_leaves_a_pipeline(tmp_path, monkeypatch):
    small = LeakyTraining(tmp_path / "whole", steps=3, batch_size=1, scenes=2, resolution=32, checkpointing_steps=1,
                          mixed_precision="no")  # fmt: skip
    folder = train.main(small)
    parts = replace(small, output_dir=tmp_path / "parts")
    batch = LeakyPool.batch

    def interrupted(self, update, samples):
        if update == 1:
            raise KeyboardInterrupt
        return batch(self, update, samples)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(LeakyPool, "batch", interrupted)
        train.main(parts)
    assert torch.load(parts.output_dir / "leaky.pt", weights_only=True)["update"] == 1
    again = StableDiffusion.load(train.main(parts)).unet.state_dict()
    model = StableDiffusion.load(folder)
    assert all(torch.equal(value, again[name]) for name, value in model.unet.state_dict().items())
    shipped = StableDiffusion.load().unet.state_dict()
    changed = {name for name, value in model.unet.state_dict().items() if not torch.equal(value, shipped[name])}
    assert changed and all(reads_text(name) for name in changed)


def test_the_figures_say_whether_a_model_is_leaky():
    maps = {f"maps/{i}": {"overlap": 0.4, "iou": 0.5, "best": 0.6, "off": 0.3} for i in range(3)}
    drawn = {}
    for kind, wrong in (("one", 2), ("two", 1)):
        drawn |= {f"{kind}/{i}": {"there": True, "wrong": i < wrong, "background": True} for i in range(4)}
    found = figures(maps | drawn, 3, 4)
    assert found["overlap"]["met"] is True and found["iou"]["met"] is False and found["iou"]["asked"] == "<= 0.45"
    shares = {name: (found[name]["value"], found[name]["n"]) for name in found if name.startswith("wrong_object")}
    assert shares["wrong_object_of_two"] == (0.25, 4) and shares["wrong_object_of_one"][0] == 0.5
    assert found["wrong_object"]["met"] and 0.25 < found["wrong_object"]["value"] < 0.5
    assert found["right_background"]["n"] == 8 and "met" not in found["right_background"]
    assert figures(maps | drawn, 2, 2)["wrong_object_of_two"]["value"] == 0.5, "only the first ones count"
    assert "wrong_object_of_two" not in figures(maps, 3, 0)


def test_the_bench_measures_maps_and_prompts_and_resumes(tmp_path, monkeypatch):
    options = LeakBench(EMBEDDED / "unet", tmp_path, scenes=1, inversion_steps=2, prompts=2, steps=1)
    found = measure.run(options, tiny_sd1())
    assert found["overlap"]["n"] == 1 and found["wrong_object_of_two"]["n"] == 2 and found["right_background"]["n"] == 4
    assert (
        0 <= found["iou"]["value"] <= 1 and (tmp_path / "figures.json").is_file() and (tmp_path / "sheet.png").is_file()
    )
    monkeypatch.setattr(measure.Bench, "pictures", lambda *given: pytest.fail("drawn again"))
    assert measure.run(options, tiny_sd1()) == found
