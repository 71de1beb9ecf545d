"""Null embeddings that make guided sampling follow the trajectory."""

from __future__ import annotations

import pytest
import torch

from personalize.embedded.samples import bundled
from personalize.errors import UserError
from personalize.models.stable_diffusion import StableDiffusion
from personalize.sampling.config import NullTextSettings
from personalize.sampling.denoise import Edit, denoise
from personalize.sampling.inversion import invert
from personalize.sampling.null_text import NullFit
from tests.support.photos import SOURCE, photo, relative, shared, smooth

STEPS = 4
EXACT = NullTextSettings(iterations=6, rate=0.1, tolerance=0, growth=0)  # a random network needs ten times the rate


@pytest.fixture(scope="module")
def plain():
    return invert(shared("sd2v"), smooth(), SOURCE, "ddim", steps=STEPS)


def fitted(plain, settings, guidance_scale=7.5):
    """The fit, and the relative error of the latents it ends with."""
    model = shared("sd2v")
    fit = NullFit(model, plain.latents, plain.conditioning, plain.null, guidance_scale, settings)
    edit = Edit(plain.conditioning, fit, guidance_scale)
    return fit, relative(denoise(model, plain.start(), edit, plain.schedule(model)), plain.latents[0])


@pytest.fixture(scope="module")
def warm(plain):
    model = shared("sd2v")
    before = {key: value.clone() for key, value in model.unet.state_dict().items()}
    found = fitted(plain, EXACT)
    assert all(torch.equal(value, before[key]) for key, value in model.unet.state_dict().items())
    assert not any(parameter.requires_grad for parameter in model.unet.parameters())
    return found


def test_dpl_c63_null_text_follows_the_trajectory(plain, warm):
    """0.51 of the uncorrected error; the embedded model, which its text does steer, is held to 0.2 below."""
    fit, error = warm
    model = shared("sd2v")
    assert error < 0.6 * relative(plain.replay(model, 7.5), plain.latents[0])
    assert error < 2 * relative(plain.replay(model, 1.0), plain.latents[0])
    assert all(min(losses) <= losses[0] for losses in fit.losses) and len(fit.rows) == STEPS
    assert all(len(losses) == EXACT.iterations + 1 for losses in fit.losses)
    for first, second in zip(fit.rows, fit.rows[1:], strict=False):
        assert not torch.equal(first.embeds, second.embeds)


def test_dpl_c63_companion_starting_every_step_afresh_is_worse(plain, warm):
    _, cold = fitted(plain, NullTextSettings(6, 0.1, 0, 0, warm_start=False))
    assert cold > 1.2 * warm[1]


@pytest.mark.slow  # 8 steps of 10 updates on the embedded model: minutes, many on a shared core
@pytest.mark.timeout(0)
def test_dpl_c63_null_text_on_the_embedded_model():
    """A rate of 0.1: with CLIP's 0.01 a step of 10 updates ends far from its target, at 0.28 of the uncorrected error.

    Measured on half-trained weights: 0.066 of the error without correction, 0.38 of that without guidance.
    """
    model, example = StableDiffusion.load(), bundled(0)
    about = (model, example.picture, example.caption)
    plain = invert(*about, "ddim", steps=8)
    found = invert(*about, "null-text", steps=8, null_text=NullTextSettings(rate=0.1, tolerance=1e-6, growth=0))
    error, free, lower = (
        relative(one.replay(model, scale), plain.latents[0])
        for one, scale in ((found, 7.5), (plain, 7.5), (plain, 1.0))
    )
    assert error < 0.2 * free and error < 2 * lower


def test_a_step_is_left_when_it_is_good_enough(plain):
    fit, _ = fitted(plain, NullTextSettings(iterations=4, tolerance=10))
    assert [len(losses) for losses in fit.losses] == [1] * STEPS
    assert all(torch.equal(row.embeds, plain.null.embeds) for row in fit.rows)
    growing, _ = fitted(plain, NullTextSettings(iterations=1, tolerance=0.0, growth=10))
    assert [len(losses) for losses in growing.losses] == [2] + [1] * (STEPS - 1)


def test_dpl_c63_replay_from_disk_is_the_end_of_the_fit(tmp_path):
    model, quick = shared("sd2v"), NullTextSettings(iterations=2, rate=0.1)
    ends = []
    original = NullFit.__call__

    def watched(self, step, latents):
        ends.append(latents)
        return original(self, step, latents)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NullFit, "__call__", watched)
        found = invert(model, photo(), SOURCE, "null-text", steps=2, null_text=quick, folder=tmp_path / "kept")
    again = invert(model, photo(), SOURCE, "null-text", steps=2, null_text=quick, folder=tmp_path / "kept")
    assert len(found.null) == 2 and torch.equal(found.null.embeds, again.null.embeds)
    replayed = []
    keep = StableDiffusion.predict
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StableDiffusion, "predict", lambda self, z, t, c: replayed.append(z[:1]) or keep(self, z, t, c))
        again.replay(model, 7.5)
    for seen, fitted_at in zip(replayed, ends, strict=True):
        assert (seen - fitted_at).abs().max() < 1e-5


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
def test_without_guidance_no_embedding_is_read_and_none_is_fitted(scale):
    model = shared("sd1")
    found = invert(model, photo(), SOURCE, "null-text", steps=2, guidance_scale=scale)
    plain = invert(model, photo(), SOURCE, "ddim", steps=2)
    assert torch.equal(found.null.embeds, plain.null.embeds) and len(found.null) == 1
    assert torch.equal(found.replay(model, scale), plain.replay(model, 1.0))


@pytest.mark.parametrize("wrong", [{"iterations": 0}, {"rate": 0.0}, {"tolerance": -1.0}, {"growth": -1.0}])
def test_values_out_of_range_are_refused(wrong):
    with pytest.raises(UserError, match="null-text takes|give a number from 0"):
        NullTextSettings(**wrong)
