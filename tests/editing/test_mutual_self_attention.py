"""Mutual self-attention: where and when the target reads the source's keys and values."""

from __future__ import annotations

import pytest
import torch

from personalize.editing.mutual_self_attention import MutualAttention, fine_decoder_sites
from personalize.models.attention import AttentionHook, attention_sites
from personalize.sampling.denoise import Edit, denoise
from personalize.sampling.schedule import make_schedule
from tests.support.tiny import NAMES, tiny, tiny_sd1


def latents(rows: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, 4, 16, 16, generator=torch.Generator().manual_seed(seed))


class Keys(AttentionHook):
    """Put behind another hook: are k and v of the rows equal, by step?"""

    def __init__(self, names):
        self.names, self.equal = names, {}

    def wants(self, site):
        return site.name in self.names

    def qkv(self, q, k, v, site):
        same = torch.equal(k[:1], k[1:]) and torch.equal(v[:1], v[1:])
        self.equal.setdefault((site.step.index, site.branch), set()).add((same, torch.equal(q[:1], q[1:])))
        return q, k, v


@pytest.mark.parametrize("name", NAMES)
def test_the_target_sees_the_source_in_both_passes_from_the_step_on(name: str):
    model = tiny(name)
    names = fine_decoder_sites(model)
    seen = Keys(names)
    edit = Edit(model.prompts(["a cat", "a dog"], (64, 64)), hooks=(MutualAttention(model, start=1 / 2), seen))
    found = denoise(model, latents().repeat(2, 1, 1, 1), edit, make_schedule(model, 2))
    assert found.isfinite().all()
    assert seen.equal[1, "null"] == {(True, False)} and seen.equal[1, "cond"] == {(True, False)}
    assert (False, False) in seen.equal[0, "cond"]


def test_the_layers_are_the_last_six_of_the_sixteen():
    model = tiny_sd1()
    ours = [n for n, site in attention_sites(model.unet).items() if not site.cross and site.place != "mid"]
    mine = fine_decoder_sites(model)
    assert len(ours) + 1 == 16 and mine == frozenset(ours[-6:])


def test_the_source_row_does_not_know_that_there_is_a_target():
    """Beyond batching noise, 1e-4 as for Prompt-to-Prompt (dpl 6.7)."""
    model = tiny_sd1()
    start, down = latents(), make_schedule(model, 2)
    alone = denoise(model, start, Edit(model.prompts(["a cat"])), down)
    edit = Edit(model.prompts(["a cat", "a dog"]), hooks=(MutualAttention(model, start=0),))
    both = denoise(model, start.repeat(2, 1, 1, 1), edit, down)
    assert (both[:1] - alone).abs().max() < 1e-4


def test_an_identity_edit_returns_the_source_row():
    """Equal rows, equal operations; 1e-5 for rows of one batch that a kernel may treat in another order."""
    model = tiny_sd1()
    edit = Edit(model.prompts(["a cat"] * 2), hooks=(MutualAttention(model, start=0),))
    found = denoise(model, latents().repeat(2, 1, 1, 1), edit, make_schedule(model, 2))
    assert (found[0] - found[1]).abs().max() < 1e-5


def test_it_draws_the_target_nearer_to_the_source():
    """Companion: without the hook the target ends farther from the source, from the same noise."""
    model = tiny_sd1()
    start, conditioning = latents().repeat(2, 1, 1, 1), model.prompts(["a cat", "a dog sitting on the beach"])
    runs = [
        denoise(model, start, Edit(conditioning, hooks=hooks), make_schedule(model, 3))
        for hooks in ((), (MutualAttention(model, 0),))
    ]
    plain, mutual = ((run[0] - run[1]).norm() for run in runs)
    assert mutual < plain
