"""Dynamic prompts: the losses by their golden numbers, and the fit on tiny random models of every family.

The tiny models listen to their text more than fresh weights do; here the nouns' queries and keys are strengthened
further, or the losses would hardly depend on the rows (dpl.md §6).
"""

from __future__ import annotations

from functools import cache

import pytest
import torch

from personalize.editing.config import DynamicSettings
from personalize.editing.dynamic_prompt_learning.fit import (
    DynamicFit,
    Leakage,
    background_loss,
    balancing_loss,
    disjoint_loss,
    fit_on_trajectory,
    noun_rows,
    sharpened,
    thresholds,
)
from personalize.editing.dynamic_prompt_learning.noun_groups import NounGroup, noun_groups
from personalize.errors import UserError
from personalize.sampling.config import NullTextSettings
from personalize.sampling.denoise import Edit, denoise, denoise_with_history
from personalize.sampling.null_text import NullFit
from personalize.sampling.schedule import Step, make_schedule
from tests.support.tiny import NAMES, tiny, tiny_sd1

PROMPT, SIZE = "a cat and a dog", (64, 64)
EAGER = DynamicSettings(updates=4, rate=6e-2, disjoint=1.0, background=1.0)  # few updates, so large ones
IDLE = (DynamicSettings(updates=0), DynamicSettings(balancing=0, disjoint=0, background=0))


def latents(seed: int = 0) -> torch.Tensor:
    return torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(seed))


def attentive(name: str = "sd1"):
    """A tiny model whose text maps depend strongly on the tokens."""
    model = tiny(name)
    with torch.no_grad():
        for key, weight in model.unet.named_parameters():
            if key.endswith(("attn2.to_q.weight", "attn2.to_k.weight")):
                weight.mul_(2)
    return model


@cache
def half() -> torch.Tensor:
    """A background (16, 16): the left half."""
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[:, :8] = True
    return mask


def step_of(model, index: int = 0, count: int = 4) -> Step:
    return make_schedule(model, count).numbered()[index]


# -- 6.5: the losses ------------------------------------------------------------------------------------------------


def test_dpl_c05_disjoint_loss():
    one, other = torch.zeros(2, 16, 16), torch.rand(16, 16)
    one[0, :8], one[1, 8:] = 1, 1
    assert disjoint_loss(one) == 0
    torch.testing.assert_close(disjoint_loss(torch.stack([other] * 3)), torch.tensor(1.0))
    torch.testing.assert_close(disjoint_loss(torch.stack([one[0], one[1], one[0]])), torch.tensor(1 / 3))


def test_dpl_c05_one_noun_has_no_overlap_and_a_gradient_that_is_a_number():
    """Companion: the published mean over no pairs is NaN, which destroys the embeddings."""
    single = torch.rand(1, 16, 16, requires_grad=True)
    loss = disjoint_loss(single)
    (gradient,) = torch.autograd.grad(loss, single)
    assert loss == 0 and torch.equal(gradient, torch.zeros_like(gradient))
    assert torch.tensor([]).mean().isnan()


def test_dpl_c05_background_loss():
    mask = half()
    inside, outside = mask.float(), (~mask).float()
    assert background_loss(outside[None], mask) == 0
    torch.testing.assert_close(background_loss(inside[None], mask), torch.tensor(1.0))
    small = torch.zeros(16, 16)
    small[:3] = 1
    torch.testing.assert_close(background_loss(torch.full((2, 16, 16), 0.3), small), torch.tensor((3 / 16) ** 0.5))
    own = torch.stack([outside, inside])  # each noun has its own region to avoid
    assert background_loss(torch.stack([inside, outside]), own) == 0
    torch.testing.assert_close(background_loss(torch.stack([inside, outside]), own.flip(0)), torch.tensor(1.0))


def test_dpl_c05_balancing_loss_by_its_kernel():
    """The published kernel's centre is 0.3319: a single hot pixel of 1 leaves 0.6681 (4 digits are given)."""
    hot = torch.zeros(2, 16, 16)
    hot[:, 5, 7] = 1
    assert abs(float(balancing_loss(hot)) - 0.6681) < 1e-4
    plus = hot.clone()
    plus[:, 4, 7] = plus[:, 6, 7] = 1
    assert abs(float(balancing_loss(plus)) - (1 - 0.3319 - 2 * 0.1221)) < 2e-4
    hot[1] = 1
    assert abs(float(balancing_loss(hot)) - 0.6681) < 1e-4  # the worst noun alone counts
    assert balancing_loss(torch.full((1, 16, 16), 1.2)) == 0  # never below 0


def test_dpl_c05_one_tenth_of_attention_wins_the_balancing_softmax():
    """A word at 0.1 among words at 0: e¹⁰ against 74 others is 0.997."""
    attention = torch.zeros(4, 4, 77)
    attention[..., 0] = 0.9  # the start token is left out
    attention[1, 1, 2] = 0.1
    groups = [NounGroup(("cat",), (2,), ((1,),))]
    assert sharpened(attention, groups)[0, 1, 1] > 0.99
    assert sharpened(attention, groups)[0, 0, 0] < 0.02
    two = [NounGroup(("cat",), (2, 3), ((1, 2),))]
    attention[1, 1, 3] = 0.1
    assert sharpened(attention, two)[0, 1, 1] > 0.99  # pieces share the prize


def test_the_marks_of_every_chunk_are_left_out_of_the_balancing_softmax():
    """The second chunk's start mark took all of it: the loss of any noun was 1, and its gradient 0."""
    attention = torch.zeros(4, 4, 3 * 77)
    attention[..., [0, 77, 154]] = 0.3
    attention[1, 1, 2] = attention[2, 2, 77 + 5] = 0.1
    groups = [NounGroup(("cat",), (2,), ((1,),)), NounGroup(("dog",), (77 + 5,), ((2,),))]
    found = sharpened(attention, groups)
    assert found[0, 1, 1] > 0.98 and found[1, 2, 2] > 0.98 and found[0, 2, 2] < 0.01  # e¹⁰ against 224 others
    words = sharpened(attention, groups, until=77 + 6)  # 75 of the first chunk and 5 of the second compete
    assert abs(float(words[1, 0, 0]) - 1 / 80) < 1e-6


def test_dpl_c05_padding_can_be_kept_from_competing():
    """Where padding takes what a word would need, no word wins among 75 tokens, and one does among its own."""
    model = attentive()
    losses = []
    for words_only in (False, True):
        settings = DynamicSettings(updates=1, words_only=words_only)
        fit = DynamicFit(model, PROMPT, noun_groups(model, PROMPT), half(), settings)
        fit(step_of(model), latents())
        losses.append(fit.result.first_losses[0])
    assert losses[1].balancing < losses[0].balancing and losses[1].disjoint == losses[0].disjoint


def test_dpl_c05_thresholds():
    table = {0: (0.300, 0.900, 0.700), 10: (0.201, 0.603, 0.573), 20: (0.135, 0.404, 0.469), 30: (0.090, 0.271, 0.384),
             40: (0.061, 0.182, 0.314), 49: (0.042, 0.127, 0.263)}  # fmt: skip
    for index, expected in table.items():
        found = vars(thresholds(index)).values()  # the table has 3 digits, one of them cut, not rounded
        assert all(abs(value - wanted) < 1e-3 for value, wanted in zip(found, expected, strict=True))
    assert thresholds(4, 10) == thresholds(20, 50)  # the clock is the share of the way


def test_dpl_c05_gradcheck():
    maps = torch.rand(2, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    mask = torch.zeros(5, 5, dtype=torch.bool)
    mask[:2] = True
    for loss in (disjoint_loss, lambda m: background_loss(m, mask), balancing_loss):
        assert torch.autograd.gradcheck(loss, [maps])


# -- 6.6: the fit ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_dpl_c06_before_any_update_nothing_has_changed_and_afterwards_nothing_stays(name: str):
    model = tiny(name)
    tables = [encoder.get_input_embeddings() for encoder in model.text_encoders]
    plain = model.prompts([PROMPT], SIZE)
    with noun_rows(model, noun_groups(model, PROMPT)) as layers:
        again = model.prompts([PROMPT], SIZE)
        assert len(layers) == len(tables) and torch.equal(plain.embeds, again.embeds)
        assert plain.pooled is None or torch.equal(plain.pooled, again.pooled)
    with pytest.raises(ZeroDivisionError), noun_rows(model, noun_groups(model, PROMPT)):
        raise ZeroDivisionError
    assert all(e.get_input_embeddings() is table for e, table in zip(model.text_encoders, tables, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_dpl_c06_one_step_lowers_the_loss_and_touches_only_the_nouns(name: str):
    """10 % is asked.  Both cosines fall too, with λ = 1 for each.  v prediction and SDXL take the same way."""
    model = attentive(name)
    states = {part: {k: v.clone() for k, v in module.state_dict().items()}
              for part, module in (("unet", model.unet), ("text", model.text_encoders[0]))}  # fmt: skip
    plain = model.prompts([PROMPT], SIZE)
    side = 8 if name == "sdxl" else 16
    fit = DynamicFit(model, PROMPT, noun_groups(model, PROMPT), half()[:side, 8 - side // 2 :][:, :side], EAGER, SIZE)
    conditioning = fit(step_of(model), latents())
    first, last = fit.result.first_losses[0], fit.result.last_losses[0]
    assert sum(vars(last).values()) < 0.9 * sum(vars(first).values())
    assert last.disjoint < first.disjoint and last.background < first.background
    assert not torch.equal(conditioning.embeds[:, 2:], plain.embeds[:, 2:]) and torch.equal(
        conditioning.embeds[:, :2], plain.embeds[:, :2]
    )
    for part, module in (("unet", model.unet), ("text", model.text_encoders[0])):
        assert all(torch.equal(value, states[part][key]) for key, value in module.state_dict().items())
        assert not any(parameter.requires_grad or parameter.grad is not None for parameter in module.parameters())
    assert all(row.abs().sum() > 0 for row in fit.result.rows[0]) and fit.result.drift[0] > 0


def test_dpl_c06_steps_start_where_the_last_one_ended_and_stop_when_good_enough():
    model = attentive()
    groups = noun_groups(model, PROMPT)
    few = DynamicSettings(updates=2, rate=5e-2)
    fit = DynamicFit(model, PROMPT, groups, half(), few)
    edit, up = Edit(model.prompts([PROMPT]), guidance_scale=1), make_schedule(model, 3, inverse=True)
    run = denoise_with_history(model, latents(), edit, up)
    found = fit_on_trajectory(fit, run.latents, make_schedule(model, 3))
    assert len(found.rows) == len(found.first_losses) == 3
    assert found.backward_passes == found.forward_passes == 3 * few.updates
    assert found.drift[0] < found.drift[-1]
    step = step_of(model)
    assert Leakage(0.29, 0.89, 0.69).within(step) and not Leakage(0.31, 0, 0).within(step)
    easy = DynamicFit(model, PROMPT, groups, half(), few)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("personalize.editing.dynamic_prompt_learning.fit.thresholds", lambda *_: Leakage(2, 2, 2))
        easy(step, latents())
    assert easy.result.forward_passes == 1 and easy.result.backward_passes == 0 == easy.result.drift[0]


@pytest.mark.parametrize("settings", IDLE, ids=["no updates", "no losses"])
def test_dpl_c06_without_losses_or_updates_it_is_null_text_alone(settings: DynamicSettings):
    """To the bit: rows are those of the table, and the null embeddings are null-text's."""
    model = tiny_sd1()
    conditioning, null, down = model.prompts([PROMPT]), model.null(), make_schedule(model, 2)
    up = make_schedule(model, 2, inverse=True)
    run = denoise_with_history(model, latents(), Edit(conditioning, guidance_scale=1), up)
    few = NullTextSettings(iterations=1)
    plain = NullFit(model, run.latents, conditioning, null, 7.5, few)
    denoise(model, run.latents[-1], Edit(conditioning, plain, 7.5), down)
    fit = DynamicFit(model, PROMPT, noun_groups(model, PROMPT), half(), settings)
    theirs = NullFit(model, run.latents, fit.latest, null, 7.5, few)
    denoise(model, run.latents[-1], Edit(fit, theirs, 7.5), down)
    assert all(torch.equal(a.embeds, b.embeds) for a, b in zip(plain.rows, theirs.rows, strict=True))
    assert fit.result.forward_passes == 0 and max(fit.result.drift) == 0


def test_dpl_c06_replay_needs_the_rows_of_every_step():
    """Fitted conditionings come back exactly; those of the first step for all do not (companion)."""
    model = attentive()
    edit, up = Edit(model.prompts([PROMPT]), guidance_scale=1), make_schedule(model, 2, inverse=True)
    run = denoise_with_history(model, latents(), edit, up)
    conditioning = []
    fit = DynamicFit(model, PROMPT, noun_groups(model, PROMPT), half(), DynamicSettings(updates=2, rate=5e-2))
    for step in make_schedule(model, 2).numbered():
        conditioning.append(fit(step, run.latents[2 - step.index]))
    again = fit.result.conditionings(model, [PROMPT, "a cat and a fox"])
    assert all(torch.equal(a.embeds, b.embeds[:1]) for a, b in zip(conditioning, again, strict=True))
    assert not torch.equal(again[0].embeds, again[1].embeds)
    other = model.prompts(["a cat and a fox"]).embeds
    assert not torch.equal(again[1].embeds[1, 2], other[0, 2])  # the cat is dynamic in the target too
    assert torch.equal(again[1].embeds[1, :2], other[0, :2])


def test_dpl_c06_rows_can_be_held_near_their_words():
    model = attentive()
    held = DynamicSettings(updates=4, rate=5e-2, disjoint=1.0, background=1.0, cap=0.05)
    fit = DynamicFit(model, PROMPT, noun_groups(model, PROMPT), half(), held)
    fit(step_of(model), latents())
    assert 0 < fit.result.drift[0] <= 0.05 + 1e-5  # rounding of the rows


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dpl_c06_half_precision_has_gradients(dtype: torch.dtype):
    """In fp16 unscaled gradients of maps' means would be rounded to nothing."""
    model = attentive()
    model.unet.to(dtype)
    fit = DynamicFit(model, PROMPT, noun_groups(model, PROMPT), half(), DynamicSettings(updates=2, disjoint=1.0))
    fit(step_of(model), latents())
    assert fit.result.drift[0] > 0 and all(row.isfinite().all() for row in fit.result.rows[0])


def test_dpl_c06_settings_out_of_range_are_refused():
    for wrong in ({"updates": -1}, {"rate": 0}, {"disjoint": -0.1}):
        with pytest.raises(UserError):
            DynamicSettings(**wrong)


@pytest.mark.slow  # a minute: ten steps of two inner loops each
def test_dpl_c06_reconstruction_beside_null_text_is_as_good_as_null_texts_own():
    """Not worse by more than 10 % of the squared error, as the spec proposes; to be confirmed on the embedded model."""
    model = attentive()
    conditioning, null, down = model.prompts([PROMPT]), model.null(), make_schedule(model, 10)
    up = make_schedule(model, 10, inverse=True)
    run = denoise_with_history(model, latents(), Edit(conditioning, guidance_scale=1), up)
    errors = []
    fit = DynamicFit(model, PROMPT, noun_groups(model, PROMPT), half())
    for of_edit, source in ((conditioning, conditioning), (fit, fit.latest)):
        nulls = NullFit(model, run.latents, source, null, 7.5, NullTextSettings())
        found = denoise(model, run.latents[-1], Edit(of_edit, nulls, 7.5), down)
        errors.append(float((found - latents()).square().mean()))
    assert errors[1] < 1.1 * errors[0]
