"""Five inversions of one picture."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler

from personalize.errors import UserError
from personalize.sampling.config import NullTextSettings
from personalize.sampling.denoise import Edit, ddim, denoise, denoise_with_history
from personalize.sampling.inversion import METHODS, invert
from personalize.sampling.schedule import Schedule, make_schedule
from tests.support.photos import SIZE, SOURCE, TARGET, gentle, photo, relative, shared, smooth

QUICK = NullTextSettings(iterations=1)
SDXL = pytest.param("sdxl", marks=pytest.mark.slow)  # in the default run test_trajectories inverts and replays it


def inverted(method="direct", name="sd1", steps=4, **more):
    return invert(shared(name), smooth(), SOURCE, method, steps=steps, null_text=QUICK, **more)


def encoded(model, *texts):
    with torch.no_grad():
        return model.prompts(texts or (SOURCE,), SIZE)


def test_dpl_c61_levels():
    model = shared()
    known = {0: 0.999150, 1: 0.998296, 21: 0.980381, 981: 0.0057755, 999: 0.0046601}
    for level, alpha in known.items():
        assert model.alpha(level) == pytest.approx(alpha, abs=1e-6)
    assert model.alpha(-19) == model.alpha(0)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("name", ["sd1", "sd2v"])
def test_dpl_c61_up_and_down_with_one_answer_is_the_identity(name, dtype, bound):
    model, draw = shared(name), torch.Generator().manual_seed(0)
    z, answer = (torch.randn(1, 4, 8, 8, generator=draw, dtype=dtype) for _ in range(2))
    for up in list(make_schedule(model, 50, inverse=True))[:40]:  # above, 1/√ᾱ beyond 5 multiplies the rounding
        _, eps = model.split(answer, z, up.alpha)
        alpha = torch.tensor(up.alpha, dtype=dtype)
        x0 = (z - (1 - alpha).sqrt() * eps) / alpha.sqrt()
        high = ddim(x0, eps, up.alpha_next)
        next_alpha = torch.tensor(up.alpha_next, dtype=dtype)
        back = ddim((high - (1 - next_alpha).sqrt() * eps) / next_alpha.sqrt(), eps, up.alpha)
        assert (back - z).abs().max() < bound


@pytest.mark.parametrize("name", ["sd1", "sd2v"])
def test_dpl_c61_agrees_with_the_stock_schedulers_step_by_step(name):
    model = shared(name)
    found = inverted("ddim", name, steps=8)
    up = DDIMInverseScheduler.from_config(model.scheduler.config, clip_sample=False)
    down = DDIMScheduler.from_config(model.scheduler.config, clip_sample=False)
    up.set_timesteps(8)
    down.set_timesteps(8)
    with torch.no_grad():
        for number, time in enumerate(up.timesteps):
            answer = model.predict(found.latents[number], time, found.conditioning)
            theirs = up.step(answer, time, found.latents[number]).prev_sample
            assert (theirs - found.latents[number + 1]).abs().max() < 1e-5
        z = found.start()
        for time in down.timesteps:
            z = down.step(model.predict(z, time, found.conditioning), time, z).prev_sample
    assert (z - found.replay(model, 1.0)).abs().max() < 1e-5


def test_dpl_c61_the_network_sees_the_lower_latents_and_the_upper_timestep(monkeypatch):
    model, seen = gentle(), []
    ask = model.predict
    monkeypatch.setattr(model, "predict", lambda z, t, c: seen.append((z, t)) or ask(z, t, c))
    found = invert(model, smooth(), SOURCE, "ddim", steps=5)
    assert [int(time) for _, time in seen] == [1, 201, 401, 601, 801]
    assert all(torch.equal(z, found.latents[number]) for number, (z, _) in enumerate(seen))


@torch.no_grad()
def round_trip(model, steps, up=None, guidance_scale=1.0):
    """Relative error of the latents after inverting and sampling."""
    clean, edit = model.encode(smooth()), Edit(encoded(model), guidance_scale=1)
    noisy = denoise(model, clean, edit, up or make_schedule(model, steps, inverse=True))
    back = denoise(model, noisy, replace(edit, guidance_scale=guidance_scale), make_schedule(model, steps))
    return relative(back, clean)


def test_dpl_c62_the_round_trip_is_first_order_and_guidance_spoils_it():
    """The bound is this random network's: 0.16 at 10 steps, where a trained one has 0.05 at 50."""
    model = shared()
    errors = [round_trip(model, steps) for steps in (10, 20)]
    assert errors[1] < 0.7 * errors[0] and errors[1] < 0.2
    assert round_trip(model, 10, guidance_scale=7.5) > 5 * errors[0]


@pytest.mark.slow  # 700 predictions
def test_dpl_c62_the_round_trip_halves_up_to_200_steps():
    errors = [round_trip(shared(), steps) for steps in (50, 100, 200)]
    assert errors[0] < 0.1 and errors[1] < 0.7 * errors[0] and errors[2] < 0.7 * errors[1]


@pytest.mark.parametrize("name", ["sd1", pytest.param("sd2v", marks=pytest.mark.slow)])
def test_dpl_c62_fixed_points_lead_back(name):
    """Through fp32 latents; in 6 steps, where each is longest and plain inversion errs most."""
    model = shared(name)
    plain, solved = (inverted("ddim", name, steps=6, fixed_point=count) for count in (0, 10))
    errors = [relative(one.replay(model, 1.0), one.latents[0]) for one in (plain, solved)]
    assert errors[1] < 1e-4 < 1e-2 < errors[0]
    assert plain.key != solved.key and torch.equal(plain.latents[0], solved.latents[0])


def test_dpl_c62_companion_levels_that_are_one_too_high_spoil_it():
    """The naive pairing takes the picture for latents at t, not t − s, and ends a step above where sampling begins."""
    model = shared()
    down = list(reversed(make_schedule(model, 10).steps))
    ends = [move.start for move in down[1:]] + [999]
    pairs = zip(down, ends, strict=True)
    naive = tuple(replace(m, start=m.start, end=e, alpha_next=model.alpha(int(e))) for m, e in pairs)
    assert round_trip(model, 10, Schedule(naive)) > 2 * round_trip(model, 10)


@pytest.mark.parametrize("name", ["sd1", "sd2v", SDXL])
def test_dpl_c63_direct_puts_the_source_on_the_trajectory_and_leaves_the_target(name):
    model, found = shared(name), inverted(name=name, steps=3)
    edit = found.edit(encoded(model, TARGET))
    rows = denoise_with_history(model, found.start(2), edit, found.schedule(model)).latents
    assert (rows[:, :1] - found.latents.flip(0)).abs().max() <= 1e-6
    free = denoise_with_history(model, found.start(2), replace(edit, latent_edits=()), found.schedule(model)).latents
    assert torch.equal(rows[:, 1], free[:, 1])
    assert relative(free[-1, :1], found.latents[0]) > 0.2  # companion: without it the source is lost
    assert torch.equal(found.replay(model), found.latents[0])


def test_dpl_c63_negative_does_not_depend_on_guidance():
    model, found = shared(), inverted("negative")
    one, much = found.replay(model, 1.0), found.replay(model, 7.5)
    assert (one - much).abs().max() < 1e-5
    assert relative(inverted("ddim").replay(model, 7.5), one) > 0.5  # companion: with the empty prompt it does


@pytest.mark.parametrize("name", ["sd1", "sd2v", SDXL])
def test_dpl_c63_ddpm_noise_comes_back_to_the_picture(name):
    model, found = shared(name), inverted("ddpm", name)
    assert relative(found.replay(model), found.latents[0]) < 1e-4
    assert relative(found.latents[0], model.encode(smooth())) < 1e-5  # a sum of two roundings
    assert not torch.equal(found.latents[-1], inverted("ddpm", name, seed=1).latents[-1])
    assert torch.equal(found.noise, inverted("ddpm", name).noise)
    assert found.noise is not None and len(found.noise) == len(found.latents) - 1 == 2  # 64 % of 4 steps


def test_dpl_c63_ddpm_is_exact_too_where_the_last_step_has_no_noise():
    model = gentle()
    model.final_alpha = 1.0
    found = invert(model, smooth(), SOURCE, "ddpm", steps=4, strength=1.0)
    assert min(move.sigma for move in make_schedule(model, 4, eta=1.0)) == 0
    assert relative(found.replay(model), found.latents[0]) < 1e-4
    silent = replace(found, noise=torch.zeros_like(found.noise))
    assert relative(silent.replay(model), found.latents[0]) > 0.5  # companion: it is the stored noise that does it


def test_dpl_c63_ddpm_versions_of_the_picture_are_independent():
    """Noise of neighbouring levels has nothing in common, unlike on a DDIM trajectory."""
    found, model = inverted("ddpm", steps=12, strength=1.0), shared()
    alphas = [move.alpha for move in reversed(found.schedule(model).steps)]
    noise = torch.stack([(z - a**0.5 * found.latents[0]) for z, a in zip(found.latents[1:], alphas, strict=True)])
    rows = torch.nn.functional.normalize(noise.flatten(1), dim=1)
    off = (rows @ rows.T - torch.eye(12)).abs()
    assert off.max() < 0.3  # 256 numbers: a standard deviation of 1/16, over 66 pairs


def test_a_share_of_the_way_and_pictures_of_any_size():
    model = shared()
    found = invert(model, photo(50, 37), SOURCE, steps=5, strength=0.6)
    assert found.latents.shape == (4, 1, 4, 16, 24) and [int(m.start) for m in found.schedule(model)] == [401, 201, 1]
    assert found.about["size"] == [64, 96]  # scaled up to 74×55 px, about the base's 64² px, and padded


@pytest.mark.slow  # half precision is emulated on most processors
@pytest.mark.parametrize(("dtype", "methods"), [(torch.bfloat16, METHODS[::3]), (torch.float16, METHODS[3:])])
def test_half_precision(dtype, methods):
    """Latents stay fp32, so that the source row is exact whatever the network computes in."""
    model = gentle()
    model.unet.to(dtype)
    for method in methods:
        found = invert(model, smooth(), SOURCE, method, steps=2, null_text=QUICK)
        assert found.latents.dtype == torch.float32 and found.latents.isfinite().all()
        assert found.null.embeds.isfinite().all()
        if method in ("direct", "ddpm"):
            assert relative(found.replay(model), found.latents[0]) < 1e-4


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((SOURCE, "reverse"), "unknown inversion 'reverse': choose one of direct, ddim, negative, null-text, ddpm"),
    ],
)
def test_mistakes(arguments, says):
    with pytest.raises(UserError, match=says):
        invert(shared(), smooth(), *arguments, steps=2)


def test_fixed_points_are_not_for_ddpm():
    with pytest.raises(UserError, match="2 fixed-point iterations of ddpm: give 0 or more, and 0 with ddpm and none"):
        inverted("ddpm", fixed_point=2)
