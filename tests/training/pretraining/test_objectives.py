"""The losses of the embedded model's training."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from personalize.training.losses import grounding
from personalize.training.pretraining import networks, objectives
from tests.support.tiny import tiny


def test_grounding_is_the_share_of_attention_off_the_thing_squared():
    masks = torch.zeros(1, 2, 2, 2)
    masks[0, 0, 0] = 1.0  # the upper half
    maps = torch.tensor([[[[3.0, 3.0], [1.0, 1.0]], [[1.0, 1.0], [1.0, 1.0]]]])
    assert torch.allclose(grounding(maps, masks), torch.tensor([[0.0625, 1.0]]))  # a quarter is off; nothing is on
    assert torch.allclose(grounding(7 * maps, masks), grounding(maps, masks)), "how much attention does not count"


class ConstantTextEncoder(nn.Module):
    """A text encoder that gives every text the same embedding."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.states = nn.Parameter(torch.randn(1, 77, width))

    def forward(self, ids):
        return SimpleNamespace(last_hidden_state=self.states.expand(len(ids), -1, -1))


def test_grounding_reaches_text_attention_and_ignores_nouns_that_are_not_named():
    unet = tiny("sd1").unet.requires_grad_(True)
    text: Any = ConstantTextEncoder(unet.config["cross_attention_dim"])
    objective = objectives.TextToImageObjective(unet, text, networks.build_scheduler(), grounding_weight=0.5)
    query = next(p for name, p in unet.named_parameters() if "up_blocks" in name and "attn2.to_q.weight" in name)
    batch = {name: torch.randn(2, 4, 16, 16) for name in ("latents", "noise")} | {
        "timesteps": torch.tensor([10, 900]), "input_ids": torch.zeros(2, 77, dtype=torch.long),
        "masks": torch.rand(2, 2, 16, 16), "nouns": torch.tensor([[2, 5], [0, 0]]),
    }  # fmt: skip

    def gradient(nouns):
        terms = objective(batch | {"nouns": nouns})
        return terms.parts["grounding"].item(), torch.autograd.grad(terms.total, query)[0]

    (named, with_grounding), (unnamed, without) = gradient(batch["nouns"]), gradient(torch.zeros_like(batch["nouns"]))
    assert 0 < named <= 1 and unnamed == 0
    assert not torch.allclose(with_grounding, without), "the loss reaches the queries of cross-attention"
