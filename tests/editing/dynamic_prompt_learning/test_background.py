"""Clusters of self-attention, and which of them are background, on maps made by hand."""

from __future__ import annotations

import pytest
import torch

from personalize.editing.dynamic_prompt_learning import background
from personalize.editing.dynamic_prompt_learning.background import background_mask, find_background, kmeans
from personalize.randomness import generator

FINE, SIDE = 8, 4


def blocks() -> torch.Tensor:
    """Labels (8, 8) of five regions whose borders fall on even cells."""
    labels = torch.zeros(FINE, FINE, dtype=torch.long)
    labels[0:4, 0:4], labels[0:4, 4:8], labels[4:8, 0:2], labels[4:8, 2:6] = 1, 2, 3, 4
    return labels


def self_attention(noise: float = 0.02) -> torch.Tensor:
    """(8, 8, 64): every position attends to its own region alone, nearly."""
    flat = blocks().flatten()
    rows = (flat[:, None] == flat).double()
    rows = rows / rows.sum(1, keepdim=True)
    rows = rows + noise * torch.rand(rows.shape, generator=generator(0, "test"), dtype=torch.float64) / FINE**2
    return rows.unflatten(0, (FINE, FINE))


def noun_map(label: int, weak: float = 0.0) -> torch.Tensor:
    """(4, 4): peak on region `label`, `weak` on region 0."""
    fine = (blocks() == label).double() + weak * (blocks() == 0)
    return fine[::2, ::2] * 0.3 + 0.01


def test_dpl_c13_clusters_recover_five_blocks():
    labels = kmeans(self_attention().flatten(0, 1), 5).unflatten(0, (FINE, FINE))
    pairs = {(int(a), int(b)) for a, b in zip(labels.flatten(), blocks().flatten(), strict=True)}
    assert len(pairs) == 5  # a bijection of names


def test_kmeans_is_repeatable_and_survives_equal_rows():
    rows = torch.rand(40, 3, generator=generator(1, "test"))
    assert torch.equal(kmeans(rows, 4, seed=2), kmeans(rows, 4, seed=2))
    assert len(kmeans(torch.ones(6, 2), 3)) == 6


@pytest.mark.parametrize("labels", [(1,), (1, 4)], ids=["one noun", "two nouns"])
def test_dpl_c13_background_is_what_no_noun_claims(labels: tuple[int, ...]):
    mask = background_mask(self_attention(), torch.stack([noun_map(label) for label in labels]))
    claimed = torch.stack([blocks() == label for label in labels]).any(0)[::2, ::2]
    assert torch.equal(mask, ~claimed)


def test_dpl_c13_a_higher_threshold_never_makes_the_background_smaller():
    maps = torch.stack([noun_map(1, weak=0.3), noun_map(2, weak=0.5)])
    masks = [background_mask(self_attention(), maps, threshold=level) for level in (0.0, 0.2, 0.4, 0.6, 0.99, 1.0)]
    assert all(bool((low <= high).all()) for low, high in zip(masks, masks[1:], strict=False))
    assert 0 < int(masks[0].sum()) < int(masks[3].sum()) < int(masks[-1].sum()) == SIDE**2


def test_dpl_c13_no_background_is_said_and_not_guessed():
    """The published script fails inside its loss here: the mask is never written."""
    everywhere = torch.stack([noun_map(label) for label in range(5)])
    mask, notes = find_background(self_attention(noise=0.0), everywhere)
    assert mask is None and "whole photo" in notes[0]
    mask, notes = find_background(self_attention(), torch.rand(1, SIDE, SIDE) * 1e-3 + 1, threshold=0.999)
    assert mask is None and "no noun stands out" in notes[0]


def test_more_clusters_are_tried_before_giving_up():
    maps = torch.stack([noun_map(label) for label in (1, 2, 4)])
    assert not background_mask(self_attention(), maps, clusters=1).any()
    mask, notes = find_background(self_attention(), maps, clusters=1)
    assert mask is not None and 0 < int(mask.sum()) < SIDE**2 and not notes


def test_the_published_resize_eats_into_the_objects():
    """Companion: bicubic residue above zero counts as background, so the mask covers cells that are all object."""
    maps = noun_map(4)[None]
    ours = background_mask(self_attention(), maps)
    theirs = background_mask(self_attention(), maps, dilated=True)
    assert bool((ours <= theirs).all()) and int(theirs.sum()) > int(ours.sum())


def test_more_positions_than_the_bound_are_averaged_over_blocks_before_they_are_clustered(monkeypatch):
    """k-means sees at most `MAX_CELLS` rows of as many values, and finds the same background."""
    maps = torch.stack([noun_map(1), noun_map(4)])
    whole = background_mask(self_attention(), maps)
    monkeypatch.setattr(background, "MAX_CELLS", 16)
    shapes, keep = [], background.kmeans
    monkeypatch.setattr(background, "kmeans", lambda rows, *more: shapes.append(rows.shape) or keep(rows, *more))
    assert torch.equal(background_mask(self_attention(), maps), whole)
    assert shapes == [(16, 16)]
