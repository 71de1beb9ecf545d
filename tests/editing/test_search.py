"""The search for strengths: a decision procedure that can be followed without any model, and runs on a tiny one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from personalize.editing.config import EditStrengths, Sampling
from personalize.editing.editor import Editor
from personalize.editing.search import Trial, next_strengths, ranked, search, state, usable_rules
from personalize.errors import UserError
from personalize.evaluation.scoring import Request, Scores
from tests.support.lora_states import ATTENTION, random_adapter
from tests.support.tiny import tiny

PICTURE = Image.new("RGB", (64, 64), "red")
REQUEST = Request("a dog in the snow", "a photo of a dog", PICTURE)
BAD = {"copy": Scores(0.1, 0.9, 0.05), "lost": Scores(0.9, 0.2, 0.9), "neither": Scores(0.1, 0.3, 0.9),
       "good": Scores(0.9, 0.8, 0.4)}  # fmt: skip


class Fixed:
    """A scorer that says of the n-th picture what the test gives it."""

    name, copy_distance, lost_distance = "fixed", 0.25, 0.65

    def __init__(self, readings):
        self.readings = iter(readings)

    def __call__(self, pictures, request):
        return [next(self.readings) for _ in pictures]


RULES = ("nodecoder", "nodecoder+noencoder", "noencoder")


def played(answer, budget=16, rules=RULES):
    """The trials of a search whose images are what `answer(strengths)` says: a state, or their scores."""
    trials = []
    for seed in range(budget):
        strengths = next_strengths(trials, budget, rules)
        said = answer(strengths)
        scores = BAD[said] if isinstance(said, str) else said
        trials.append(Trial(strengths, seed, PICTURE, scores, state(scores, Fixed([]))))
    return trials


def forgotten(trials):
    return [trial.strengths.forget for trial in trials]


def test_learned_words_are_left_out_of_what_is_scored_as_by_keep_best():
    """No scorer knows them."""
    request = Request("a photo of a <Rex> dog on the beach", "a photo of a <rex> dog", PICTURE)
    bare = request.without(["<rex>"])
    assert (bare.prompt, bare.caption) == ("a photo of a dog on the beach", "a photo of a dog")
    said = []

    class Noting(Fixed):
        def __call__(self, pictures, request):
            said.append(request)
            return super().__call__(pictures, request)

    model = tiny("sd1")
    learned = replace(random_adapter(model), source=None, concepts={"<rex>": {"text_encoder": torch.ones(1, 32)}})
    list(search(Editor(model, learned), request, Noting([BAD["good"]]), budget=1, sampling=Sampling(1)))
    assert said == [bare]


@pytest.mark.parametrize("what", list(BAD))
def test_states(what):
    assert state(BAD[what], Fixed([])) == what


@pytest.mark.parametrize(("budget", "first"), [(1, 1), (8, 1), (16, 2), (64, 8), (200, 8)])
def test_an_eighth_of_the_budget_goes_over_strengths_without_forgetting(budget, first):
    plain = [trial.strengths for trial in played(lambda strengths: "copy", budget)[: first + 1]]
    assert len(set(plain[:first])) == first and {one.forget for one in plain[:first]} == {"none"}
    assert budget == 1 or plain[first].forget == "nodecoder"


def test_an_edit_that_does_not_show_is_tried_without_the_adapter_in_the_decoder_in_both_and_in_the_encoder():
    tried = played(lambda strengths: "copy", budget=16)
    assert tuple(dict.fromkeys(forgotten(tried[2:7]))) == RULES and forgotten(tried[2:5]) == ["nodecoder"] * 3
    betas = {trial.strengths.forget: trial.strengths.beta for trial in tried[:7]}
    assert betas["noencoder"] < betas["nodecoder"], "encoder forgetting goes with a smaller beta"
    assert len({trial.strengths for trial in tried[:13]}) == 13, "nothing is tried twice as long as there is more"


def test_what_came_nearest_to_the_edit_is_then_made_stronger_and_at_last_subtracted():
    near, far = Scores(0.4, 0.5, 0.5), Scores(0.1, 0.9, 0.05)
    tried = played(lambda s: near if s.forget == "nodecoder" else far, budget=12)[6:]
    assert forgotten(tried) == ["nodecoder"] * 6
    assert [t.strengths.beta for t in tried[:3]] == [1.6, 1.6, 2.0] and tried[2].strengths.alpha == 0.5
    assert [t.strengths.gamma for t in tried[3:]] == [1.0, 1.2, 0.8]


@pytest.mark.parametrize("hidden_from", [0.3, 0.6, 0.9, 1.0])
def test_as_much_of_the_adapter_is_kept_as_lets_the_edit_show(hidden_from):
    """The share kept ends at most 2 · 0.2 below the share from which on the edit is hidden, after three images."""

    def answer(strengths):
        share = 1.0 if strengths.forget == "none" else float(strengths.forget.partition("=")[2] or 0)
        return Scores(0.9, 0.3 + 0.5 * share, 0.5) if share < hidden_from else BAD["copy"]

    tried = played(answer, budget=8)
    best = ranked(tried)[0].strengths.forget
    share = float(best.partition("=")[2] or 0)
    assert hidden_from - 0.4 <= share < hidden_from
    first = forgotten(tried)[1:3]
    assert first == ["nodecoder", "nodecoder=0.5"]


def test_a_share_that_shows_the_edit_but_scores_worse_is_not_tried_for_the_whole_budget():
    """Half way to it is tried once, then other strengths."""

    def answer(strengths):
        share = float(strengths.forget.partition("=")[2] or 0)
        return BAD["copy"] if strengths.forget == "none" else Scores(0.9 - 0.6 * share, 0.5, 0.5)

    tried = played(answer, budget=12)
    assert all(trial.scores.edit >= 0.5 for trial in tried[1:])
    assert forgotten(tried)[1:4] == ["nodecoder", "nodecoder=0.5", "nodecoder=0.25"]
    assert set(forgotten(tried)[4:]) == {"nodecoder"} and len({trial.strengths for trial in tried[4:]}) >= 4


def test_of_two_sides_the_same_share_is_kept():
    tried = played(lambda s: "good" if "+" in s.forget else "copy", budget=9)
    assert forgotten(tried)[3:6] == ["nodecoder", "nodecoder+noencoder", "nodecoder=0.5+noencoder=0.5"]


def test_an_edit_that_shows_without_forgetting_is_improved_by_other_strengths_and_seeds():
    tried = played(lambda strengths: "good", budget=12)
    assert set(forgotten(tried)) == {"none"}
    again = [trial for trial in tried if trial.strengths == tried[0].strengths]
    others = [trial.strengths for trial in tried[2:] if trial.strengths != tried[0].strengths]
    assert len(again) >= 5 and len(others) == len(set(others)) >= 5
    assert (others[0].alpha, others[0].beta) == (0.9, 0.8), "more of the source first"
    assert min(one.beta for one in others) >= 0.8


@pytest.mark.parametrize("what", list(BAD))
def test_no_budget_is_spent_twice(what):
    tried = played(lambda strengths: what, budget=40)
    assert len({(trial.strengths, trial.seed) for trial in tried}) == 40


def test_equal_scores_keep_their_order():
    trials = [Trial(EditStrengths(beta=b), 0, PICTURE, BAD["good"], "good") for b in (1.0, 1.2)]
    assert ranked(trials) == trials
    worse = Trial(EditStrengths(), 1, PICTURE, BAD["lost"], "lost")
    assert ranked([worse, *trials])[-1] is worse


@pytest.fixture(scope="module")
def editor():
    model = tiny("sd1")
    return Editor(model, random_adapter(model))


def test_the_search_is_the_same_for_the_same_seed_and_leaves_no_trace(editor):
    before = {name: tensor.clone() for name, tensor in editor.model.unet.state_dict().items()}

    def run(seed):
        answers = [BAD["copy"], BAD["copy"], BAD["lost"], BAD["good"]]
        return list(search(editor, REQUEST, Fixed(answers), budget=4, seed=seed, sampling=Sampling(steps=1)))

    first, again, other = run(0), run(0), run(7)
    assert [(t.strengths, t.seed, t.picture.tobytes()) for t in first] == [
        (t.strengths, t.seed, t.picture.tobytes()) for t in again
    ]
    assert first[0].picture.tobytes() != other[0].picture.tobytes() and other[0].seed == 7
    after = editor.model.unet.state_dict()
    assert list(before) == list(after) and all((before[name] == after[name]).all() for name in before)


def test_a_trial_is_what_edit_draws_with_its_setting_and_seed(editor):
    trial = list(search(editor, REQUEST, Fixed([BAD["copy"]] * 4), budget=4, sampling=Sampling(steps=2)))[-1]
    assert trial.strengths.forget == "nodecoder" and trial.seed == 3
    drawn = editor.edit(REQUEST.prompt, trial.strengths, seeds=[trial.seed], sampling=Sampling(steps=2))[0]
    assert np.array_equal(np.asarray(drawn), np.asarray(trial.picture))


def test_the_library_call_ranks_what_it_has_drawn(editor):
    answers = Fixed([BAD["copy"], BAD["good"]])
    best, other = editor.choose("a dog in the snow", PICTURE, budget=2, scorer=answers, sampling=Sampling(steps=1))
    assert (best.state, best.seed, other.seed) == ("good", 1, 0) and best.scores.score > other.scores.score


def test_only_rules_that_select_something_are_tried(editor):
    assert usable_rules(editor) == RULES
    assert usable_rules(Editor(editor.model, random_adapter(editor.model, want=ATTENTION))) == RULES
    decoder = random_adapter(editor.model)
    decoder = replace(decoder, lora={key: value for key, value in decoder.lora.items() if "up_blocks" in key})
    assert usable_rules(Editor(editor.model, decoder)) == ("nodecoder",)


def test_no_rule_is_tried_on_an_adapter_that_none_can_scale(editor):
    """One with changes other than LoRA beside it would be refused after an eighth of the budget."""
    adapter = random_adapter(editor.model)
    mixed = replace(adapter, others={"unet.conv_in": {"ia3_l": torch.ones(4, 1)}})
    words = replace(adapter, lora={}, concepts={"<rex>": {"text_encoder": torch.ones(1, 32)}})
    assert usable_rules(Editor(editor.model, mixed)) == () == usable_rules(Editor(editor.model, words))
    tried = played(lambda strengths: "copy", budget=16, rules=())
    assert set(forgotten(tried)) == {"none"} and len({trial.strengths for trial in tried}) == 8


def test_mistakes(editor):
    with pytest.raises(UserError, match="at least 1"):
        next(search(editor, REQUEST, Fixed([]), budget=0))
    with pytest.raises(UserError, match="--clip_model"):
        editor.choose("a dog", PICTURE, budget=1)
