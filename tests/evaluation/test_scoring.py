"""Scores of pictures, as numbers."""

from __future__ import annotations

import torch

from personalize.evaluation.scoring import Scores, clip_score


def test_forgedit_c32_clip_score_is_two_and_a_half_times_the_positive_cosine():
    image = torch.tensor([[1.0, 0.0], [1.0, 1.0], [-1.0, 0.0]])
    text = torch.tensor([[2.0, 0.0]])
    assert torch.allclose(clip_score(image, text), torch.tensor([2.5, 2.5 / 2**0.5, 0.0]), atol=1e-6)  # the spec's


def test_a_picture_without_one_of_the_two_is_worth_nothing():
    assert Scores(1.0, 0.0, 0.9).score == 0 and Scores(0.0, 1.0, 0.0).score == 0
    assert Scores(0.6, 0.6, 0.3).score > Scores(1.0, 0.3, 0.3).score, "balance counts"
