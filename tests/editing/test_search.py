"""The search for strengths: a decision procedure that can be followed without any model, and runs on a tiny one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from personalize.editing.config import EditStrengths, Sampling
from personalize.editing.editor import Editor
from personalize.editing.search import (
    ATTENTION_ONLY,
    STRONGER,
    Trial,
    next_proposal,
    ranked,
    search,
    state,
    usable_rules,
)
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


def played(answer, budget=16, ladder=STRONGER, seed=0):
    """The settings and seeds of a search whose pictures are what `answer(setting)` says."""
    tried = []
    for _ in range(budget):
        setting, number = next_proposal(tried, budget, ladder, seed)
        reading = BAD[answer(setting)]
        tried.append(Trial(setting, number, PICTURE, reading, state(reading, Fixed([]))))
    return tried


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


def test_half_of_the_budget_goes_over_strengths_without_forgetting():
    tried = played(lambda setting: "copy", budget=12)
    plain = [trial.strengths for trial in tried[:6]]
    assert len(set(plain)) == 6 and all(s.forget == "none" and s.gamma is None for s in plain)
    assert {0.7, 0.8, 0.9} == {s.alpha for s in plain} and [trial.seed for trial in tried[:6]] == list(range(6))


def test_a_copy_makes_it_forget_more_and_more_on_both_sides():
    tried = played(lambda setting: "copy", budget=16)
    assert tuple(dict.fromkeys(t.strengths.forget for t in tried[8:14])) == STRONGER
    betas = {t.strengths.forget: t.strengths.beta for t in tried}
    assert betas["encoderattn"] < betas["decoderattn"], "encoder forgetting goes with a smaller beta"


def test_a_lost_source_makes_it_forget_less_or_keep_more():
    tried = played(lambda s: "lost" if s.forget == "decoderattn" else "copy", budget=14)
    first = next(i for i, t in enumerate(tried) if t.strengths.forget == "decoderattn")
    after = [t.strengths for t in tried[first + 1 : first + 6]]
    assert after[0].forget == "decoderattn+decoder2" and after[1].forget == "decoderattn=0.5"
    assert after[2].alpha > tried[first].strengths.alpha and tried[first + 1].seed == tried[first].seed


def test_neither_leads_to_subtraction_and_other_seeds():
    tried = played(lambda setting: "neither", budget=14)
    assert [t.strengths.gamma for t in tried[7:10]] == [0.8, 1.0, 1.2]
    assert len({t.seed for t in tried}) == 14


def test_a_good_picture_is_refined_and_tried_with_other_seeds():
    tried = played(lambda s: "good", budget=12)
    best = tried[0]
    rest = tried[6:]
    assert any(t.seed == best.seed and t.strengths != best.strengths for t in rest)
    assert any(t.seed != best.seed and t.strengths == best.strengths for t in rest)
    assert len({(t.strengths, t.seed) for t in tried}) == 12, "no picture is drawn twice"


@pytest.mark.parametrize("what", list(BAD))
def test_no_budget_is_spent_twice(what):
    tried = played(lambda setting: what, budget=40)
    assert len({(t.strengths, t.seed) for t in tried}) == 40


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
    assert trial.strengths.forget in STRONGER
    drawn = editor.edit(REQUEST.prompt, trial.strengths, seeds=[trial.seed], sampling=Sampling(steps=2))[0]
    assert np.array_equal(np.asarray(drawn), np.asarray(trial.picture))


def test_the_library_call_ranks_what_it_has_drawn(editor):
    answers = Fixed([BAD["copy"], BAD["good"]])
    best, other = editor.choose("a dog in the snow", PICTURE, budget=2, scorer=answers, sampling=Sampling(steps=1))
    assert (best.state, best.seed, other.seed) == ("good", 1, 0) and best.scores.score > other.scores.score


def test_only_rules_that_select_something_are_tried(editor):
    assert usable_rules(editor) == STRONGER
    attention = random_adapter(editor.model, want=ATTENTION)
    assert usable_rules(Editor(editor.model, attention)) == ATTENTION_ONLY


def test_mistakes(editor):
    with pytest.raises(UserError, match="at least 1"):
        next(search(editor, REQUEST, Fixed([]), budget=0))
    with pytest.raises(UserError, match="--clip_model"):
        editor.choose("a dog", PICTURE, budget=1)
