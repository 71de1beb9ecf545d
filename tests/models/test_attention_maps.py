"""Text maps of a stage, and of every step of an inversion (dpl.md §6.4)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from personalize.editing.dynamic_prompt_learning.stage_maps import StageMaps, stage_attention
from personalize.models.attention import attention_sites, hooked
from personalize.models.attention_maps import InversionMaps, stage_level
from personalize.models.gradient_checkpointing import gradient_checkpointing
from personalize.sampling.denoise import Edit, denoise
from personalize.sampling.schedule import make_schedule
from tests.support.tiny import NAMES, tiny, tiny_sd1

PROMPT, SIZE = "a cat and a dog", (64, 64)


def latents() -> torch.Tensor:
    return torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", NAMES)
def test_dpl_c04_stage_maps_are_means_of_all_layers_of_the_stage(name: str):
    """Cut off behind the last layer or not, the maps are the same; both paths are in them."""
    model = tiny(name)
    conditioning, step = model.prompts([PROMPT], SIZE), make_schedule(model, 4).numbered()[0]
    attention = stage_attention(model, latents(), step, conditioning)
    assert (attention >= 0).all() and (attention.sum(-1) - 1).abs().max() < 1e-5
    assert torch.equal(attention, stage_attention(model, latents(), step, conditioning))
    whole = InversionMaps(model, (16, 16))
    with torch.no_grad(), hooked(model.unet, [whole], step=step):
        model.predict(latents(), step.timestep, conditioning)
    torch.testing.assert_close(whole.cross_attention()[0], attention.detach(), rtol=0, atol=1e-6)
    sites = attention_sites(model.unet)
    ours = [sites[one] for one in StageMaps(model, (16, 16)).names]
    assert {site.place for site in ours} >= {"down", "up"} and {site.level for site in ours} == {stage_level(model)}
    assert name != "sd1" or len(ours) == 5
    rows = whole.self_attention()
    torch.testing.assert_close(rows.sum(-1), torch.ones(rows.shape[:2]))
    assert all(processor.__class__.__name__ != "_Processor" for processor in model.unet.attn_processors.values())


def test_inversion_maps_are_of_every_step():
    model = tiny_sd1()
    maps = InversionMaps(model, (16, 16))
    edit = Edit(model.prompts([PROMPT]), guidance_scale=1, hooks=(maps,))
    denoise(model, latents(), edit, make_schedule(model, 3, inverse=True))
    assert maps.cross_attention().shape == (3, 16, 16, 77) and maps.self_attention().shape == (16, 16, 256)
    assert not torch.equal(maps.cross_attention()[0], maps.cross_attention()[2])


@pytest.mark.parametrize("name", NAMES)
def test_stage_maps_have_the_same_gradient_under_checkpointing(name: str):
    """To the bit on a CPU: recomputed blocks neither stop the pass nor replace the maps of the first one."""
    model = tiny(name)
    step = make_schedule(model, 4).numbered()[0]
    gradients = []
    for enabled in (False, True):
        conditioning = model.prompts([PROMPT], SIZE)
        embeds = conditioning.embeds.detach().clone().requires_grad_(True)
        with torch.enable_grad(), gradient_checkpointing(model.unet, enabled):
            maps = stage_attention(model, latents(), step, replace(conditioning, embeds=embeds))
        maps[..., 2].square().sum().backward()
        gradients.append(embeds.grad)
    assert gradients[0].abs().max() > 0 and torch.equal(*gradients)
