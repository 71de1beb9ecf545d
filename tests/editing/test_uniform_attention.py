"""Uniform attention maps: the hook, the mask's arithmetic, the schedule, what is blended and what it costs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler

from personalize.editing.config import UniformSettings
from personalize.editing.uniform_attention import (
    UniformBlend,
    UniformMaps,
    auxiliary_estimates,
    edit_mask,
    reconstruct,
    uniform_edit,
)
from personalize.errors import UserError
from personalize.models.attention import AttentionHook, attention_sites, hooked
from personalize.sampling.denoise import Edit, denoise, denoise_with_history
from personalize.sampling.schedule import Schedule, Step, Transition, make_schedule
from tests.support.tiny import NAMES, tiny, tiny_sd1

SIZE = (64, 64)


def latents(rows: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, 4, 16, 16, generator=torch.Generator().manual_seed(seed))


class Explicit(AttentionHook):
    """The definition: a matrix of 1/N in the place of the softmax."""

    def __init__(self):
        self.shapes = set()

    def wants(self, site):
        return site.cross

    def probs(self, p, site):
        self.shapes.add((p.shape[1], p.shape[3]))
        return torch.full_like(p, 1 / p.shape[-1])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tokens", [5, 77])
def test_uniform_u1_equals_the_matrix_of_one_nth(name: str, tokens: int):
    """1e-5 is asked, of outputs of unit size; head counts differ between the families and, in sd2v, the stages."""
    model = tiny(name)
    conditioning = model.prompts(["a cat"], SIZE)
    conditioning = type(conditioning)(conditioning.embeds[:, :tokens], conditioning.pooled, conditioning.time_ids)
    outputs, explicit = [], Explicit()
    for hook in (UniformMaps(), explicit):
        with torch.no_grad(), hooked(model.unet, [hook]):
            outputs.append(model.predict(latents(), 500, conditioning))
    assert (outputs[0] - outputs[1]).abs().max() < 1e-5
    assert {length for _, length in explicit.shapes} == {tokens}
    assert name == "sd1" or len({heads for heads, _ in explicit.shapes}) > 1


def test_uniform_u1_output_is_one_vector_whatever_the_picture():
    model = tiny_sd1()
    name = next(name for name, site in attention_sites(model.unet).items() if site.cross)
    outputs = []
    layer = model.unet.get_submodule(name)
    handle = layer.register_forward_hook(lambda module, args, output: outputs.append(output))
    with torch.no_grad(), hooked(model.unet, [UniformMaps()]):
        for seed, timestep in ((0, 900), (1, 20)):
            model.predict(latents(seed=seed), timestep, model.prompts(["a cat"]))
    with torch.no_grad():
        model.predict(latents(), 900, model.prompts(["a cat"]))
    handle.remove()
    first, second, plain = outputs
    assert torch.equal(first, second)
    assert torch.equal(first, first[:, :1].expand_as(first))
    assert (plain - plain[:, :1]).abs().max() > 1e-3  # ordinary attention tells positions apart


def test_uniform_u2_reconstruction_does_not_know_the_caption():
    """It never receives one; ordinary sampling does, and differs."""
    model = tiny_sd1()
    plan = make_schedule(model, 2, inverse=True), make_schedule(model, 2)
    edits = uniform_edit(model, SIZE), uniform_edit(model, SIZE)
    assert torch.equal(edits[0].conditioning.embeds, model.prompts([""]).embeds)
    once, again = (reconstruct(model, latents(), *plan) for _ in range(2))
    assert torch.equal(once, again)
    plain = [denoise(model, latents(), Edit(model.prompts([text]), guidance_scale=1), plan[0]) for text in ("", "cat")]
    assert not torch.equal(*plain)


def test_uniform_u3_leaves_no_trace_also_when_the_body_raises():
    model = tiny_sd1()
    before = dict(model.unet.attn_processors)
    served = []
    hook = UniformMaps()
    hook.active = lambda site: served.append(site.name) or True
    with torch.no_grad(), hooked(model.unet, [hook]):
        model.predict(latents(), 500, model.prompts(["a cat"]))
    crossing = {name for name, site in attention_sites(model.unet).items() if site.cross}
    assert set(served) == crossing and len(crossing) == 16  # SD 1.x has sixteen
    with pytest.raises(ZeroDivisionError), hooked(model.unet, [UniformMaps()]):
        raise ZeroDivisionError
    assert all(model.unet.attn_processors[name] is processor for name, processor in before.items())


def test_uniform_u3_a_hook_that_serves_nothing_is_an_error():
    class Nowhere(UniformMaps):
        def wants(self, site):
            return False

    model = tiny_sd1()
    with pytest.raises(UserError, match="matches no site"), torch.no_grad(), hooked(model.unet, [Nowhere()]):
        model.predict(latents(), 500, model.prompts(["a cat"]))


def test_uniform_u4_an_edit_is_more_than_twice_the_quantile():
    """Values 0 … 10 in one row: their median is 5 and nothing exceeds 2 · 5; at q = 0.4, λ = 4."""
    difference = torch.arange(11.0).view(1, 1, 1, 11)
    assert edit_mask(difference, 0.5, dilate=0).sum() == 0
    assert edit_mask(-difference, 0.4, dilate=0).flatten().tolist() == [False] * 9 + [True] * 2  # |Δ| > 8
    assert edit_mask(difference, 0.5, threshold_scale=1, dilate=0).sum() == 5  # 6 … 10


def test_uniform_u4_dilation_grows_the_edited_side():
    difference = torch.full((1, 2, 7, 7), 0.01)
    difference[0, 0, 3, 3] = 1
    edited = edit_mask(difference, 0.5)
    assert edited[0, 0].sum() == 9 and edited[0, 0, 2:5, 2:5].all() and not edited[0, 1].any()
    assert edit_mask(difference, 0.5, reduce="any")[0, 1].sum() == 9
    assert not edit_mask(difference, 0.5, reduce="mean").any()  # one channel of two is no majority


@pytest.mark.parametrize(
    ("quantile", "scale", "before", "after"),
    [(0.4, 2, 28, 94), (0.5, 2, 17, 81), (0.7, 2, 3.8, 29), (0.4, 1, 60, 99.9), (0.5, 1, 50, 99.7), (0.7, 1, 30, 95)],
)
def test_uniform_u4_shares_of_white_noise(quantile: float, scale: float, before: float, after: float):
    """±1.5 points, as the spec has it: 65,536 values have a sampling error of 0.2; dilation multiplies it by up to 9.

    The rows of scale 1 are the companion: without the doubled threshold nearly all would be edited.
    """
    noise = torch.randn(4, 4, 64, 64, generator=torch.Generator().manual_seed(0))
    for dilate, share in ((0, before), (1, after)):
        found = 100 * edit_mask(noise, quantile, threshold_scale=scale, dilate=dilate).float().mean()
        assert abs(float(found) - share) < 1.5


def test_uniform_u5_nine_steps_are_blended_with_growing_quantiles():
    """Its own scheduler, with steps_offset 0 as in the paper's runs; with the usual offset of 1 it would be ten."""
    counts = []
    for offset in (0, 1):
        stock = DDIMScheduler(1000, 0.00085, 0.012, "scaled_linear", clip_sample=False, set_alpha_to_one=False,
                              steps_offset=offset)  # fmt: skip
        stock.set_timesteps(50)
        times = [int(t) for t in stock.timesteps]
        steps = [Step(t, t - 20, t, 0.5, 0.6, index=i, count=50) for i, t in enumerate(times)]
        blended = [step for step in steps if UniformSettings().blends(step)]
        counts.append(len(blended))
        if offset == 0:
            quantiles = [UniformSettings().quantile_at(step) for step in blended]
            assert [int(step.start) for step in blended] == list(range(180, 0, -20))
            assert [round(value, 4) for value in (quantiles[0], quantiles[-1])] == [0.4082, 0.4898]
    assert counts == [9, 10]


def plan(count: int = 4) -> Schedule:
    """Moves whose second half is below T_mask; their ᾱ do not matter here."""
    times = [900, 500, 150, 50][:count]
    return Schedule(tuple(Transition(t, t - 1, t, 0.5, 0.6) for t in times))


def steps(count: int = 4) -> list[Step]:
    return plan(count).numbered()


@pytest.mark.parametrize("blend_source", [False, True])
def test_uniform_u6_kept_cells_are_the_auxiliary_to_the_bit_and_the_rest_is_untouched(blend_source: bool):
    ours, theirs = latents(2), latents(1, seed=1)
    blend = UniformBlend({150: theirs, 50: theirs}, UniformSettings(blend_source=blend_source))
    step = steps()[2]
    after = blend.clean(ours, step)
    edited = blend.masks[150]
    assert edited.any() and not edited.all()
    assert torch.equal(after[1][~edited[0]], theirs[0][~edited[0]]) and torch.equal(
        after[1][edited[0]], ours[1][edited[0]]
    )
    expected = torch.where(edited, theirs, ours[:1]) if blend_source else ours[:1]
    assert torch.equal(after[:1], expected)
    assert blend.clean(ours, steps()[0]) is ours  # above T_mask


def test_uniform_u6_where_all_is_edited_the_step_is_an_ordinary_ddim_step():
    model, everything = tiny_sd1(), torch.ones(16, 16, dtype=torch.bool)
    conditioning = model.prompts(["a cat", "a dog"])
    down = make_schedule(model, 2)
    clean = {move.start: latents() for move in down}
    blend = UniformBlend(clean, UniformSettings(until=1.0), mask=everything)
    start = latents().repeat(2, 1, 1, 1)
    runs = [denoise(model, start, Edit(conditioning, latent_edits=edits), down) for edits in ((), (blend,))]
    assert torch.equal(*runs) and len(blend.masks) == 2


def test_uniform_u7_an_identity_edit_is_the_auxiliary_where_it_is_blended():
    """Δ = 0, so nothing is edited, at the first blended step.  Later ones see what that blending itself changed, unless
    the source is blended too; here the last step alone is below T_mask, so that the picture is the auxiliary's."""
    model = tiny_sd1()
    up, down = make_schedule(model, 2, inverse=True), make_schedule(model, 2)
    settings = UniformSettings(until=0.25)
    clean = auxiliary_estimates(model, latents(), up, down, settings)
    blend = UniformBlend(clean, settings)
    conditioning = model.prompts(["a cat"] * 2)
    start = denoise(model, latents(), Edit(conditioning[:1], guidance_scale=1), up).repeat(2, 1, 1, 1)
    run = denoise_with_history(model, start, Edit(conditioning, latent_edits=(blend,)), down)
    assert [*blend.masks] == [*clean] == [1] and not blend.edited_regions().any()
    assert torch.equal(run.clean[-1][1], clean[1][0]) and not torch.equal(run.clean[-1][0], clean[1][0])


def test_a_relative_threshold_alone_finds_edits_in_rounding():
    """Companion of the floor: |Δ| of 1e-6 is no edit, though a sixth of it exceeds twice its own quantile."""
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    assert edit_mask(noise, 0.5, dilate=0).float().mean() > 0.1
    assert not edit_mask(noise * 1e-6, 0.5, dilate=0).any()


def test_uniform_u13_costs_350_rows_in_the_reference_mode():
    """50 × (ordinary + uniform inversion) + 50 × (4 rows of the edit + 1 auxiliary): counted on 2 steps of the 50."""
    model, count = tiny_sd1(), {"rows": 0}
    plain = model.predict

    def counting(z, *args):
        count["rows"] += len(z)
        return plain(z, *args)

    model.predict = counting
    up, down = make_schedule(model, 2, inverse=True), make_schedule(model, 2)
    settings = UniformSettings()
    clean = auxiliary_estimates(model, latents(), up, down, settings)
    start = denoise(model, latents(), Edit(model.prompts(["a cat"]), guidance_scale=1), up).repeat(2, 1, 1, 1)
    edit = Edit(model.prompts(["a cat", "a dog"]), latent_edits=(UniformBlend(clean, settings),))
    denoise(model, start, edit, down)
    assert count["rows"] * 25 == 350


@pytest.mark.parametrize(("mode", "rows"), [("u", 8), ("stored", 2 * 2), ("z0", 0)])
def test_uniform_u14_auxiliaries_and_what_they_cost(mode: str, rows: int):
    model, count = tiny_sd1(), SimpleNamespace(rows=0)
    plain = model.predict

    def counting(z, *args):
        count.rows += len(z)
        return plain(z, *args)

    model.predict = counting
    up, down = make_schedule(model, 4, inverse=True), make_schedule(model, 4)
    settings = UniformSettings(auxiliary=mode, until=0.5)  # the steps at 251 and 1 are below T_mask
    clean = auxiliary_estimates(model, latents(), up, down, settings)
    assert sorted(clean) == [1, 251] and count.rows == rows
    if mode == "z0":
        assert torch.equal(clean[1], latents())
    if mode == "stored":
        edit = uniform_edit(model, SIZE)
        stored = denoise_with_history(model, latents(), edit, up).latents[2]
        assert torch.equal(clean[251], denoise_with_history(model, stored, edit, down[2:]).clean[0])


def test_settings_out_of_range_are_refused():
    for wrong in ({"auxiliary": "v"}, {"until": 1.5}, {"quantile": -1}, {"reduce": "all"}):
        with pytest.raises(UserError):
            UniformSettings(**wrong)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_uniform_maps_in_half_precision(dtype: torch.dtype):
    """Within the rounding of the type: 3 (bf16) or 10 (fp16) bits of a unit output, over a tiny UNet's 70 layers."""
    model = tiny_sd1()
    conditioning = model.prompts(["a cat"])
    outputs = []
    for kind in (torch.float32, dtype):
        model.unet.to(kind)
        with torch.no_grad(), hooked(model.unet, [UniformMaps()]):
            outputs.append(model.predict(latents(), 500, conditioning))
    assert (outputs[0] - outputs[1]).abs().mean() < 0.05 * outputs[0].abs().mean()
