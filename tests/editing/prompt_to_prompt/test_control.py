"""Prompt-to-Prompt: what targets take from the source, and what they keep."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from personalize.editing.config import ControlSettings
from personalize.editing.prompt_to_prompt.control import (
    Alignment,
    SelfControl,
    TextControl,
    align,
    coarse_self_layers,
    make_controls,
)
from personalize.editing.prompt_to_prompt.local_blend import LocalBlend
from personalize.errors import UserError
from personalize.models.attention import AttentionSite, attention_sites, hooked
from personalize.models.attention_maps import MapStore, MapSum, calibration_layers
from personalize.models.empty import empty_model
from personalize.models.prompts import tokenize_prompt
from personalize.sampling.denoise import denoise, denoise_with_history
from personalize.sampling.inversion import invert
from personalize.sampling.schedule import Step
from tests.support.photos import SIZE, SOURCE, TARGET, shared, smooth

STEPS, LATENTS = 4, (8, 8)
PLAIN = ControlSettings()
LAYER = "up_blocks.3.attentions.0.transformer_blocks.0.attn2"


def site(index=0, count=10, branch="cond", **more):
    about = {"cross": True, "heads": 2, "height": 4, "width": 4} | more
    return AttentionSite(LAYER, "up", 0, step=Step(1, 0, 1, 0.5, 0.9, index=index, count=count), branch=branch, **about)


def maps(rows=2, length=77, seed=0):
    return torch.rand(rows, 2, 16, length, generator=torch.Generator().manual_seed(seed)).softmax(-1)


def tokenized(text):
    return tokenize_prompt(shared(), text)


def hook(source, target, weights=None, **settings):
    made = make_controls(shared(), source, target, steps=10, weights=weights, settings=ControlSettings(**settings))
    return made.hooks[0]


# The hooks by themselves


def test_dpl_c67_replace_takes_the_sources_columns():
    p = maps()
    found = hook(SOURCE, TARGET).probs(p, site())
    assert torch.equal(found[0], p[0]) and torch.equal(found[1], p[0])  # one piece for one: all of it
    longer = hook("a cat on snow", "a unicorn on snow").probs(p, site())[1]  # 7 letters, 7 pieces
    torch.testing.assert_close(longer[..., 2:9], (p[0, ..., 2:3] / 7).expand(-1, -1, 7))
    assert torch.equal(longer[..., 9:12], p[0, ..., 3:6])


def test_dpl_c67_refine_keeps_new_words_and_binds_an_adjective_to_its_noun():
    p = maps()
    bound = hook("a cat on snow", "a red cat on snow").probs(p, site())[1]
    assert torch.equal(bound[..., 2], p[0, ..., 2]) and torch.equal(bound[..., 3:6], p[0, ..., 2:5])
    free = hook("a cat on snow", "a red cat on snow", bind_adjectives=False).probs(p, site())[1]
    assert torch.equal(free[..., 2], p[1, ..., 2]) and torch.equal(free[..., 3:6], p[0, ..., 2:5])
    assert torch.equal(free[..., 20:], p[0, ..., 20:])  # the padding


def test_dpl_c67_reweighting_scales_one_column_and_nothing_else():
    p = maps()
    found = hook(SOURCE, SOURCE, {"cat": 3.0}).probs(p, site())[1]
    expected = p[0].clone()
    expected[..., 3] *= 3
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found.sum(-1), 1 + 2 * p[0, ..., 3])
    assert torch.equal(hook(SOURCE, SOURCE, {"cat": 1.0}).probs(p, site())[1], p[0])
    twice: Any = hook("a cat and a cat", "a cat and a cat", {"cat": 2.0})
    assert twice.weights.flatten().tolist()[1:7] == [1, 2, 1, 1, 2, 1]  # every occurrence


def test_steps_are_counted_by_the_loop_and_words_may_have_their_own():
    control = hook(SOURCE, TARGET, cross_replace_steps=0.7, word_steps={"beach": (0.2, 0.4)})
    p = maps()
    active = [control.active(site(index)) for index in range(10)]
    assert active == [True] * 7 + [False] * 3 and not control.active(site(branch="null"))
    beach = [torch.equal(control.probs(p, site(index))[1, ..., 6], p[0, ..., 6]) for index in range(10)]
    assert beach == [index in (2, 3) for index in range(10)]
    mine = SelfControl(3, [LAYER])
    assert [mine.active(site(index)) for index in range(5)] == [True] * 3 + [False] * 2
    assert mine.wants(site()) and not SelfControl(3, []).wants(site())


@pytest.mark.parametrize(("family", "controlled", "layers"), [("sd1", 11, 16), ("sd2", 11, 16), ("sdxl", 60, 70)])
def test_the_same_self_attention_layers_are_controlled_at_every_shape(family, controlled, layers):
    """A count of positions took 6 of SD 1.5's layers at 4:3 in place of 11, and none of SDXL's in place of 60."""
    model: Any = empty_model(family)
    made = make_controls_of(model)
    side = model.unet.config["sample_size"]
    for width, height in ((1, 1), (4, 3), (3, 2), (16, 9), (9, 16)):
        scale = (width / height) ** 0.5
        size = (8 * round(side / scale / 8), 8 * round(side * scale / 8))
        sites = [one for one in attention_sites(model.unet, size).values() if not one.cross]
        assert (sum(made.wants(one) for one in sites), len(sites)) == (controlled, layers), (width, height)


def make_controls_of(model: Any) -> SelfControl:
    return SelfControl(1, coarse_self_layers(model, PLAIN.self_max_side))


def test_words_exchanged_for_as_many_are_replaced_and_others_are_aligned_by_content():
    """Equally long, but "red" was put in and "the" dropped: word for word, "cat" would get the map of "on"."""
    source = tokenized("a cat on the beach")
    assert align(source, tokenized("a dog on the snow"), 77).mode == "replace"
    found = align(source, tokenized("a red cat on beach"), 77)
    assert found.mode == "refine"
    assert found.matrix[2, 3] == found.matrix[3, 4] == found.matrix[5, 5] == 1  # cat, on, beach
    assert found.matrix[2, 2] == 1, "the adjective has the map of its noun"


def test_several_targets_have_alignments_of_their_own():
    made = make_controls(shared(), SOURCE, [TARGET, "a fox on the beach"], steps=10)
    assert [one.mode for one in made.alignments] == ["replace", "refine"]
    p = maps(3)
    found = made.hooks[0].probs(p, site())
    assert torch.equal(found[1], p[0]) and torch.equal(found[2, ..., 2], p[2, ..., 2])


def test_auto_replaces_where_it_can():
    assert align(tokenized(SOURCE), tokenized(TARGET), 77).mode == "replace"
    refined = align(tokenized(SOURCE), tokenized(TARGET), 77, ControlSettings("refine"))
    assert refined.mode == "refine" and refined.own.nonzero().flatten().tolist() == [3]
    with pytest.raises(UserError, match="use mode refine"):
        align(tokenized(SOURCE), tokenized("a dog"), 77, ControlSettings("replace"))
    phrase = align(tokenized("a cat on snow"), tokenized("a red dog on snow"), 77, swaps=[((2,), (2, 3))])
    assert phrase.mode == "replace" and phrase.matrix[2, 2:4].tolist() == [0.5, 0.5]


def test_dpl_c67_local_blend_reads_conditional_rows_of_source_and_target():
    """Marked maps: the source's word lights one corner, the target's another; the null pass says everything."""
    words = torch.zeros(2, 77)
    words[0, 3] = words[1, 4] = 1
    store = MapSum([LAYER])
    marked = torch.zeros(2, 2, 16, 77)
    marked[0, :, 0, 3], marked[1, :, 15, 4] = 1, 1
    marked[0, :, 3, 4] = marked[1, :, 12, 3] = 9.0  # other words' tokens: not to be read
    assert store.active(site()) and not store.active(site(branch="null"))
    store.probs(marked, site())
    blend = LocalBlend(store, words[:, None], 0.3, begin=2)
    mask = blend.mask((8, 8))
    assert mask.shape == (2, 1, 8, 8)
    corner = torch.zeros(8, 8, dtype=torch.bool)
    corner[:4, :4] = True  # one cell of 4×4, pooled 3×3, at twice the size
    assert torch.equal(mask[0, 0], corner) and torch.equal(mask[1, 0], corner | corner.flip(0, 1))
    z = torch.randn(2, 4, 8, 8)
    found = blend.latents(z, Step(1, 0, 1, 0.5, 0.9, index=2, count=10))
    assert torch.equal(found[0], z[0])
    assert torch.equal(found[1], torch.where(mask[1], z[1], z[0]))
    assert torch.equal(blend.latents(z, Step(1, 0, 1, 0.5, 0.9, index=1, count=10)), z)


def test_map_sum_is_a_mean_and_needs_a_map():
    store = MapSum([LAYER])
    with pytest.raises(ValueError, match="no attention map was collected"):
        store.mean()
    first, second = maps(seed=1), maps(seed=2)
    store.probs(first, site())
    store.probs(second, site(1))
    torch.testing.assert_close(store.mean(), ((first + second) / 2).mean(1).unflatten(1, (4, 4)))


@torch.no_grad()
def test_dpl_c64_the_maps_that_are_summed():
    """Five layers of SD 1.x, each a distribution over the tokens; reading them changes nothing, twice is the same."""
    model, latents = shared(), torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    layers = calibration_layers(model.unet, (16, 16))
    assert len(layers) == 5
    prompt = model.prompts([SOURCE])
    plain, found = model.predict(latents, 500, prompt), []
    for _ in range(2):
        store = MapSum(layers)
        with hooked(model.unet, [store]):
            seen = model.predict(latents, 500, prompt)
        assert (seen - plain).abs().max() < 1e-4 and store.count == 5
        found.append(store.mean())
    assert found[0].shape == (1, 16, 16, 77) and found[0].min() >= 0 and torch.equal(*found)
    torch.testing.assert_close(found[0].sum(-1), torch.ones(1, 16, 16), atol=1e-5, rtol=0)


# In the loop


@pytest.fixture(scope="module")
def ddim():
    return invert(shared(), smooth(), SOURCE, "ddim", steps=STEPS)


def sampled(run, target, settings=PLAIN, hooks=(), **more):
    """Latents (2, c, h, w) of source and target."""
    model = shared()
    made = make_controls(model, SOURCE, target, steps=STEPS, settings=settings, **more)
    with torch.no_grad():
        edit = run.edit(model.prompts([target], SIZE), hooks=(*made.hooks, *hooks), latent_edits=made.latent_edits)
    return denoise(model, run.start(2), edit, run.schedule(model))


@pytest.mark.parametrize(("share", "blend"), [(0.0, False), (0.4, True), (0.8, False)])
def test_dpl_c67_an_edit_that_changes_nothing_returns_the_source_row(ddim, share, blend):
    settings = ControlSettings(cross_replace_steps=share, self_replace_steps=share)
    local = [("cat", "cat")] if blend else []
    found = sampled(ddim, SOURCE, settings, blend=local, weights={"cat": 1.0})
    assert (found[0] - found[1]).abs().max() < 1e-5


def test_dpl_c67_without_controls_it_is_plain_guided_sampling(ddim):
    """1e-4: one row and two are summed in another order."""
    model = shared()
    found = sampled(ddim, TARGET, ControlSettings(cross_replace_steps=0, self_replace_steps=0))
    with torch.no_grad():
        edit = replace(ddim.edit(), conditioning=model.prompts([TARGET], SIZE))
    alone = denoise(model, ddim.start(), edit, ddim.schedule(model))
    torch.testing.assert_close(found[1:], alone, atol=1e-4, rtol=1e-4)
    source = denoise(model, ddim.start(), ddim.edit(), ddim.schedule(model))
    torch.testing.assert_close(found[:1], source, atol=1e-4, rtol=1e-4)


def test_dpl_c67_word_swap_through_all_steps_keeps_every_map(ddim):
    settings = ControlSettings(cross_replace_steps=1, self_replace_steps=1)
    store = MapStore(cross=None)
    found = sampled(ddim, TARGET, settings, hooks=(store,))
    assert len(store.maps) == 32
    for p in store.maps.values():
        torch.testing.assert_close(p[1], p[0], atol=1e-6, rtol=0)  # the same q and k, in rows of one batch
    assert (found[0] - found[1]).abs().max() > 1e-3  # and yet another picture, by its values


def test_dpl_c67_outside_the_blend_the_target_is_the_source(ddim):
    model = shared()
    settings = ControlSettings(blend_start=0, blend_threshold=0.9)
    made = make_controls(model, SOURCE, TARGET, steps=STEPS, settings=settings, blend=[("cat", "dog")])
    with torch.no_grad():
        edit = ddim.edit(model.prompts([TARGET], SIZE), hooks=made.hooks, latent_edits=made.latent_edits)
    rows = denoise_with_history(model, ddim.start(2), edit, ddim.schedule(model)).latents[-1]
    blend: Any = made.latent_edits[0]
    outside = ~blend.mask(LATENTS)[1].expand_as(rows[1])
    assert 0 < outside.float().mean() < 1
    assert torch.equal(rows[1][outside], rows[0][outside]) and not torch.equal(rows[1][~outside], rows[0][~outside])


def test_layers_are_left_as_they_were_when_the_body_raises(ddim):
    model = shared()
    before = {name: id(one) for name, one in model.unet.attn_processors.items()}
    wrong = TextControl([Alignment(torch.eye(5), torch.zeros(5))], [torch.ones(5)], [torch.zeros(5)], [torch.ones(5)])
    with torch.no_grad(), pytest.raises(RuntimeError):
        edit = ddim.edit(model.prompts([TARGET], SIZE), hooks=(wrong,))
        denoise(model, ddim.start(2), edit, ddim.schedule(model))
    assert {name: id(one) for name, one in model.unet.attn_processors.items()} == before


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"weights": {"dogg": 2.0}}, "the word 'dogg' is not in the prompt 'a red dog on the beach': did you mean dog"),
        ({"blend": [("dog", "beach")]}, "the word 'dog' is not in the prompt 'a red cat on the beach'"),
        ({"swaps": [("red", "the")]}, "replacing red by the in .* does not give 'a red dog on the beach': swap all"),
        ({"swaps": [("cat", "xylophone")]}, "the word 'xylophone' is not in the prompt 'a red dog"),
    ],
)
def test_mistakes_name_the_word(more, says):
    with pytest.raises(UserError, match=says):
        make_controls(shared(), SOURCE, TARGET, steps=4, **more)


@pytest.mark.parametrize("wrong", [{"cross_replace_steps": 1.2}, {"blend_threshold": -0.1}, {"mode": "swap"}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        ControlSettings(**wrong)


def test_a_weight_of_zero_takes_away_all_that_the_word_itself_says():
    """Nothing of its value is left in any layer; what remains of it in a picture comes from the tokens behind it."""
    p, value = maps(), torch.randn(77, 5, generator=torch.Generator().manual_seed(1))
    silent = hook(SOURCE, SOURCE, {"cat": 0.0})
    other = value.clone()
    other[3] = 100.0  # the cat's
    found = [silent.probs(p, site(index))[1] @ values for index in range(8) for values in (value, other)]
    assert all(torch.equal(found[0], one) for one in found)
    assert not torch.equal(p[1] @ value, p[1] @ other)
