"""Editing without inversion (InfEdit): its equations, in both forms, on tiny bases of both predictions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from personalize.sampling.denoise import LatentEdit, denoise, denoise_with_history
from personalize.sampling.inversion import invert
from personalize.sampling.schedule import Step
from personalize.sampling.virtual_inversion import ConsistentRows, noisy_versions
from tests.support.photos import SOURCE, TARGET, shared, smooth

STEPS = 3


class Estimates(LatentEdit):
    """Keeps the estimates as the model made them, before they are corrected."""

    def __init__(self) -> None:
        self.x0: list[torch.Tensor] = []

    def clean(self, x0, step):
        self.x0.append(x0)
        return x0


def run(name: str, target: str = TARGET, seed: int = 0):
    """The trajectory, the history of source and target, and the estimates before their correction."""
    model = shared(name)
    trajectory = invert(model, smooth(), SOURCE, "none", steps=STEPS, seed=seed)
    seen = Estimates()
    edit = trajectory.edit(model.prompts([target], (32, 32)), guidance_scale=2.0)
    edit = replace(edit, latent_edits=(seen, *edit.latent_edits))
    history = denoise_with_history(model, trajectory.start(2), edit, trajectory.schedule(model))
    return trajectory, history, seen.x0


@pytest.mark.parametrize("name", ["sd1", "sd2v"])
def test_infedit_the_source_row_is_the_photo_with_fresh_noise_at_every_level(name):
    trajectory, history, _ = run(name)
    assert torch.equal(history.latents[:, 0], trajectory.latents.flip(0)[:, 0])
    for version, step in zip(trajectory.latents.flip(0), history.schedule, strict=False):
        noise = (version - step.alpha**0.5 * trajectory.latents[0]) / (1 - step.alpha) ** 0.5
        assert 0.8 < noise.std() < 1.2 and noise.mean().abs() < 0.2  # 256 values: 4 standard errors
    assert history.schedule.steps[0].start == 999, "few-step models begin at pure noise"


@pytest.mark.parametrize("name", ["sd1", "sd2v"])
def test_infedit_the_correction_is_that_of_the_paper(name):
    """x̂0_tgt = f(z_tgt, ε_tgt − ε_src + ε_cons), and z′ = √ᾱ′ x̂0_tgt + √(1−ᾱ′) n′ with the source's own noise n′."""
    trajectory, history, raw = run(name)
    photo = trajectory.latents[0]
    for index, step in enumerate(history.schedule):
        z, (signal, sigma) = history.latents[index], (step.alpha**0.5, (1 - step.alpha) ** 0.5)
        source, target = ((z[row] - signal * raw[index][row]) / sigma for row in (0, 1))  # ε̂ of the two rows
        consistent = (z[0] - signal * photo[0]) / sigma
        expected = (z[1] - sigma * (target - source + consistent)) / signal
        # ε̂ is divided by √ᾱ, which is 0.07 at the noisiest level: fp32 rounding grows to 1e-3 there
        torch.testing.assert_close(history.clean[index][1], expected, rtol=0, atol=2e-3)
        if index < STEPS - 1:
            signal, sigma = step.alpha_next**0.5, (1 - step.alpha_next) ** 0.5
            noise = (history.latents[index + 1][0] - signal * photo[0]) / sigma
            moved = signal * history.clean[index][1] + sigma * noise
            torch.testing.assert_close(history.latents[index + 1][1], moved, rtol=0, atol=1e-4)
    torch.testing.assert_close(history.latents[-1][1], history.clean[-1][1], rtol=0, atol=1e-6)


def test_infedit_a_shift_between_the_estimates_is_the_edit():
    """Estimates that differ by a constant: the result is the photo and that constant, at any step."""
    photo = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    rows = ConsistentRows(torch.stack([photo, photo * 0.5]))
    step = Step(999, -1, 999, 0.01, 0.99, index=0, count=1)
    found = rows.clean(torch.cat([photo + 7, photo + 10]), step)
    torch.testing.assert_close(found, torch.cat([photo, photo + 3]))
    torch.testing.assert_close(rows.latents(torch.zeros(2, 4, 2, 2), step), torch.cat([photo, photo + 3]))


def test_infedit_the_seed_draws_the_noise():
    model = shared()
    clean, down = torch.zeros(1, 4, 2, 2), run("sd1")[0].schedule(model)
    once, again, other = (noisy_versions(clean, down, seed) for seed in (0, 0, 1))
    assert torch.equal(once, again) and not torch.equal(once, other)
    assert torch.equal(once[0], clean) and len(once) == STEPS + 1


def test_infedit_costs_a_prediction_of_both_rows_for_each_step(monkeypatch):
    model, asked = shared(), []
    keep = type(model).predict
    monkeypatch.setattr(type(model), "predict", lambda self, z, *more: asked.append(len(z)) or keep(self, z, *more))
    trajectory = invert(model, smooth(), SOURCE, "none", steps=STEPS)
    assert asked == []
    edit = trajectory.edit(model.prompts([TARGET]), guidance_scale=1.0)
    denoise(model, trajectory.start(2), edit, trajectory.schedule(model))
    assert asked == [2] * STEPS
