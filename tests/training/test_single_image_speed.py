"""What makes learning faster changes nothing of what is learned but roundings."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from personalize.adapters.lora import load_lora
from personalize.models.stable_diffusion import Conditioning
from personalize.randomness import generator
from personalize.training.single_image import learn, single_image_run
from tests.support.runs import CAPTION, SMALL, pixels, probe_loss
from tests.support.tiny import tiny_sd1


def test_speed_picture_and_prompt_are_encoded_once_and_for_all() -> None:
    """What the updates see is, to the bit, what encoding anew for each of them would give."""
    model, calls = tiny_sd1(), []
    for part in (model.vae.encoder, model.text_encoders[0]):
        part.register_forward_hook(lambda module, *_: calls.append(module))
    config = replace(SMALL, resample_latents=True, train_text_encoder=False, text_embedding_lr=0.0)
    with single_image_run(model, pixels(), CAPTION, config) as run:
        assert calls == [model.vae.encoder, model.text_encoders[0]]
        seen = [batch["latents"] for batch in run.dataset.batches(run.shard, 0, run.updates)]
        assert sum(1 for _ in run.steps()) == len(seen) == 4 and len(calls) == 2
        kept = run.objective.source().embeds.detach().clone()
    draws = [generator(config.seed, "posterior", update, 0) for update in range(4)]
    assert all(torch.equal(latents, model.encode(pixels(), draw)) for latents, draw in zip(seen, draws, strict=True))
    assert not torch.equal(seen[0], seen[1])  # drawn anew from the posterior, which was found once
    assert torch.equal(kept, model.prompts([CAPTION]).embeds)


@pytest.mark.slow  # two adapters of twelve updates
def test_speed_a_bf16_base_learns_what_an_fp32_base_learns() -> None:
    """Probe losses, both in fp32: 2.5 before, 1.6 after; a fiftieth of them allows for other rounding."""
    config = replace(SMALL, rank=4, max_train_samples=24, samples_per_update=2, text_embedding_lr=3e-2)
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        model, plain = tiny_sd1(), tiny_sd1()
        model.unet.to(dtype)
        adapter = learn(model, pixels(), CAPTION, config)
        assert adapter.source is not None
        load_lora(plain.unet, adapter.lora, adapter.rank, adapter.alpha)
        losses.append(probe_loss(plain, Conditioning(adapter.source["embeds"])))
    with torch.no_grad():
        first = probe_loss(tiny_sd1(), tiny_sd1().prompts([CAPTION]))
    assert max(losses) < 0.75 * first and abs(losses[1] / losses[0] - 1) < 0.02
