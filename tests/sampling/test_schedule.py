"""Schedules: the pairs of timesteps of an inversion, and where steps end."""

import pytest
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

from personalize.errors import UserError
from personalize.sampling.config import SCHEDULERS
from personalize.sampling.schedule import make_schedule
from tests.support.tiny import tiny_sd1


def test_dpl_1_1_timesteps_and_pairing_of_inversion():
    model = tiny_sd1()
    down, up = make_schedule(model, 50), make_schedule(model, 50, inverse=True)
    assert [int(move.timestep) for move in down] == list(range(981, 0, -20))
    assert (down.steps[-1].start, down.steps[-1].end) == (1, -1)
    assert down.steps[-1].alpha_next == pytest.approx(0.999150, rel=1e-5)
    for inverse, forward in zip(up, reversed(down.steps), strict=True):
        assert (inverse.start, inverse.end, inverse.timestep) == (forward.end, forward.start, forward.timestep)
        assert (inverse.alpha, inverse.alpha_next) == (forward.alpha_next, forward.alpha)


def test_attentiondrag_2_2_strength_keeps_the_clean_end():
    plan = make_schedule(tiny_sd1(), 10, strength=0.7)
    assert [int(move.timestep) for move in plan] == [601, 501, 401, 301, 201, 101, 1]


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [7, 30, 50])
def test_every_step_ends_where_the_next_begins(spacing, steps):
    """Otherwise latents at one level are predicted as if at another: with a spacing of 33, 966 → 933, then 932."""
    model = tiny_sd1()
    down = make_schedule(model, steps, spacing=spacing)
    assert [one.end for one in down.steps[:-1]] == [one.start for one in down.steps[1:]]
    assert down.steps[-1].end < 0 and down.steps[-1].alpha_next == model.final_alpha
    up = make_schedule(model, steps, inverse=True, spacing=spacing)
    assert [(one.start, one.end) for one in up] == [(one.end, one.start) for one in reversed(down.steps)]


@pytest.mark.parametrize(
    ("name", "algorithm", "karras"),
    [
        ("dpm++_2m", "dpmsolver++", False),
        ("dpm++_2m_karras", "dpmsolver++", True),
        ("dpm++_2m_sde", "sde-dpmsolver++", False),
    ],
)
def test_dpm_is_what_its_name_says_whatever_the_base_has(name, algorithm, karras):
    """A base that is published with Karras sigmas and the stochastic solver made all three the same."""
    model = tiny_sd1()
    own = {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True}
    model.scheduler = DPMSolverMultistepScheduler.from_config(model.scheduler.config, **own)
    schedule = make_schedule(model, 4, name)
    found = schedule.scheduler.config
    assert (found.algorithm_type, found.use_karras_sigmas) == (algorithm, karras)
    assert schedule.draw_noise == algorithm.startswith("sde")


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("own", ["use_karras_sigmas", "use_exponential_sigmas"])
def test_a_base_published_with_other_noise_levels_does_not_bend_the_samplers(name, own):
    """`euler` was Euler with Karras sigmas there, and two spacings at once ended in diffusers' own error."""
    model = tiny_sd1()
    plain = make_schedule(model, 4, name)
    model.scheduler = DPMSolverMultistepScheduler.from_config(model.scheduler.config, **{own: True})
    assert [one.start for one in make_schedule(model, 4, name).steps] == [one.start for one in plain.steps]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_base_of_zero_terminal_snr_is_sampled_on_its_own_levels_or_not_at_all(name):
    """diffusers' Heun and PNDM leave the setting out, and drew from levels that the base was not trained on."""
    model = tiny_sd1()
    model.scheduler = DDIMScheduler.from_config(model.scheduler.config, rescale_betas_zero_snr=True)
    if name in ("heun", "pndm"):
        with pytest.raises(UserError, match=f"{name} does not know the noise schedule of this base"):
            make_schedule(model, 4, name)
        return
    own = make_schedule(model, 4, name, spacing="trailing").scheduler
    assert own is None if name == "ddim" else own.config.rescale_betas_zero_snr
