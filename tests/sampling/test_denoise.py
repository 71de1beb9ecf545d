from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from personalize.adapters.forgetting import parse_rule
from personalize.adapters.lora import add_lora, module_names
from personalize.errors import UserError
from personalize.models.attention import AttentionHook
from personalize.models.attention_maps import MapStore
from personalize.sampling.denoise import Edit, LatentEdit, ddim, denoise, denoise_with_history, initial_latents, sample
from personalize.sampling.schedule import Schedule, make_schedule
from tests.support.tiny import NAMES, tiny, tiny_sd1

SIZE = (32, 32)


def plain(model, guidance_scale=1.0, **more):
    return Edit(model.prompts(["a cat"], SIZE), guidance_scale=guidance_scale, **more)


def noise(model, *seeds):
    return initial_latents(model, seeds or (0,), SIZE)


class Gentle:
    """A base whose noise depends weakly on latents, timestep and prompt, as a trained one's does near an image."""

    def __init__(self, model):
        self.inner = model

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def predict(self, latents, timestep, conditioning):
        return 0.05 * self.inner.predict(latents, timestep, conditioning)


@pytest.mark.parametrize(("name", "bound"), [("sd1", 0.1), pytest.param("sd2v", 0.2, marks=pytest.mark.slow)])
def test_invert_and_replay_returns_the_latents(name, bound):
    """First order in the step: twice the steps about halve the relative error; the bounds are these random UNets'."""
    model = tiny(name)
    model = Gentle(model) if name == "sd1" else model
    clean = noise(model)
    errors = []
    for steps in (10, 20):
        noisy = denoise(model, clean, plain(model), make_schedule(model, steps, inverse=True))
        replay = denoise(model, noisy, plain(model), make_schedule(model, steps))
        errors.append(float((replay - clean).norm() / clean.norm()))
    assert errors[1] < bound and errors[1] < 0.8 * errors[0]


def test_replay_is_exact_when_the_noise_does_not_depend_on_the_latents():
    """1e-4: each way multiplies by up to 13 in fp32."""
    model = tiny_sd1()

    class Constant(Gentle):
        def predict(self, latents, timestep, conditioning):
            return torch.sin(torch.arange(latents.numel()).float() + timestep).view_as(latents)

    fixed, clean = Constant(model), noise(model)
    noisy = denoise(fixed, clean, plain(model), make_schedule(model, 20, inverse=True))
    assert (noisy - clean).abs().max() > 0.5
    torch.testing.assert_close(denoise(fixed, noisy, plain(model), make_schedule(model, 20)), clean, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_every_row_is_drawn_by_its_own_seed(name):
    model = tiny(name)
    edit, plan = plain(model, 2.0), make_schedule(model, 3, eta=1.0)
    together = sample(model, edit, [5, 6], plan, SIZE)
    alone = sample(model, edit, [6], plan, SIZE)
    torch.testing.assert_close(together[1:], alone, atol=1e-4, rtol=1e-4)  # batches sum in another order
    assert torch.equal(together, sample(model, edit, [5, 6], plan, SIZE))
    assert (together[0] - together[1]).abs().max() > 0.1


def test_guidance_one_is_one_pass_and_rows_may_be_guided_differently():
    model, calls = tiny_sd1(), []
    original = model.unet.forward
    model.unet.forward = lambda sample, *args, **kwargs: calls.append(len(sample)) or original(sample, *args, **kwargs)
    both, plan = noise(model, 1, 2), make_schedule(model, 2)
    off, on = (denoise(model, both, plain(model, scale), plan) for scale in (1.0, 4.0))
    assert calls == [2, 2, 4, 4]
    assert torch.equal(denoise(model, both, plain(model, 0.0), plan), off)  # as diffusers, for Turbo and LCM models
    mixed = denoise(model, both, plain(model, (1.0, 4.0)), plan)
    torch.testing.assert_close(mixed, torch.stack([off[0], on[1]]), atol=1e-4, rtol=1e-4)  # other batch size


def test_condition_is_asked_at_each_step_and_may_optimise():
    model, asked = tiny_sd1(), []
    base = model.prompts(["a cat"])

    def condition(step, latents):
        assert not torch.is_grad_enabled()
        with torch.enable_grad():
            embeds = base.embeds.clone().requires_grad_(True)
            model.predict(latents, step.timestep, replace(base, embeds=embeds)).square().mean().backward()
        asked.append((step.index, step.count, int(step.timestep), latents.shape[0], float(embeds.grad.abs().max()) > 0))
        return base

    store = MapStore(side=8)
    edit = Edit(base, negative=condition, guidance_scale=2.0, hooks=(store,))
    varied = denoise(model, noise(model), edit, make_schedule(model, 3))
    assert asked == [(0, 3, 667, 1, True), (1, 3, 334, 1, True), (2, 3, 1, 1, True)]
    constant = denoise(model, noise(model), replace(edit, negative=base, hooks=()), make_schedule(model, 3))
    torch.testing.assert_close(varied, constant, atol=1e-4, rtol=1e-4)  # explicit softmax against fused


def test_hooks_see_step_and_branch():
    model, seen = tiny_sd1(), []

    class Look(AttentionHook):
        def wants(self, site):
            return site.place == "mid" and site.cross

        def active(self, site):
            seen.append((site.branch, site.step.index, int(site.step.timestep)))
            return False

    denoise(model, noise(model), plain(model, 2.0, hooks=(Look(),)), make_schedule(model, 2))
    assert set(seen) == {("null", 0, 501), ("cond", 0, 501), ("null", 1, 1), ("cond", 1, 1)}


def test_identity_parts_change_nothing():
    model, plan, start = tiny_sd1(), make_schedule(tiny_sd1(), 3), noise(tiny_sd1())
    edit = plain(model, 2.0)
    full = replace(edit, hooks=(AttentionHook(),), latent_edits=(LatentEdit(),))
    torch.testing.assert_close(
        denoise(model, start, full, plan), denoise(model, start, edit, plan), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("scheduler", ["ddim", "euler", "dpm++_2m"])
def test_clean_edits_decide_where_the_moves_end(scheduler):
    """The last level is clean: what the estimate is overwritten by comes out. 1e-4: divided by the last σ, 0.03."""
    model = tiny_sd1()
    wanted = noise(model, 7)

    class Overwrite(LatentEdit):
        def clean(self, x0, step):
            return wanted if step.index == step.count - 1 else x0

    plan = make_schedule(model, 3, scheduler)
    if scheduler == "ddim":  # its last level is ᾱ(0), not 1
        plan = Schedule((*plan.steps[:-1], replace(plan.steps[-1], alpha_next=1.0)))
    result = denoise(model, plan.begin(noise(model)), plain(model, latent_edits=(Overwrite(),)), plan)
    torch.testing.assert_close(result, wanted, atol=1e-4, rtol=0)


def test_latent_edits_can_pin_the_source_row():
    model, plan = tiny_sd1(), make_schedule(tiny_sd1(), 3)
    pivots = denoise_with_history(model, noise(model, 1), plain(model), plan).latents

    class Pin(LatentEdit):
        def latents(self, z, step):
            return torch.cat([pivots[step.index + 1], z[1:]])

    out = denoise(model, noise(model, 1, 2), plain(model, 3.0, latent_edits=(Pin(),)), plan)
    assert torch.equal(out[:1], pivots[-1])


def test_stored_noise_reconstructs_any_path():
    """Edit-friendly DDPM: solve for the noise of each move on the same loop, then replay it. 1e-3: divided by σ."""
    model = tiny_sd1()
    plan = make_schedule(model, 4, eta=1.0)
    clean, draws = noise(model), torch.randn(5, 1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    alphas = [plan.steps[0].alpha, *(move.alpha_next for move in plan)]
    path = [a**0.5 * clean + (1 - a) ** 0.5 * n for a, n in zip(alphas, draws, strict=True)]
    solved = []

    class Solve(LatentEdit):
        def latents(self, z, step):
            solved.append((path[step.index + 1] - z) / step.sigma if step.sigma else torch.zeros_like(z))
            return path[step.index + 1]

    silent = Schedule(tuple(replace(move, noise=torch.zeros_like(clean)) for move in plan))
    denoise(model, path[0], plain(model, latent_edits=(Solve(),)), silent)
    stored = Schedule(tuple(replace(move, noise=n) for move, n in zip(plan, solved, strict=True)))
    replayed = denoise_with_history(model, path[0], plain(model), stored)
    torch.testing.assert_close(replayed.latents[-2], path[-2], atol=1e-3, rtol=0)


@pytest.mark.parametrize("scheduler", ["ddim", "euler", "pndm"])
def test_trajectories_remember_latents_and_clean_estimates(scheduler):
    model = tiny_sd1()
    plan, start = make_schedule(model, 4, scheduler), noise(model, 1, 2)
    run = denoise_with_history(model, start, plain(model), plan)
    assert run.latents.shape == (len(plan) + 1, 2, 4, 8, 8) and run.clean.shape == (len(plan), 2, 4, 8, 8)
    assert torch.equal(run.latents[0], start)
    torch.testing.assert_close(run.latents[-1], denoise(model, start, plain(model), plan), atol=1e-3, rtol=1e-3)
    output = model.predict(start, plan.steps[0].timestep, plain(model).conditioning.repeat(2))
    expected, _ = model.split(output, start, plan.steps[0].alpha)
    torch.testing.assert_close(run.clean[0], expected.detach(), atol=1e-4, rtol=1e-4)


def test_slices_of_moves_continue_where_they_were_cut():
    model = tiny_sd1()
    for scheduler in ("ddim", "euler"):
        plan, start = make_schedule(model, 4, scheduler), noise(model)
        half = denoise(model, start, plain(model), plan[:2])
        torch.testing.assert_close(
            denoise(model, half, plain(model), plan[2:]),
            denoise(model, start, plain(model), plan),
            atol=1e-4,
            rtol=1e-4,
        )


def test_rule_and_strength_scale_the_adapter_within_the_loop_only():
    model = tiny_sd1()
    start, plan = noise(model), make_schedule(model, 2)
    base = denoise(model, start, plain(model), plan)
    add_lora(model.unet, module_names(model.unet), 2, 2, 0)
    with torch.no_grad():
        for name, parameter in model.unet.named_parameters():
            if ".lora_B." in name:
                parameter.fill_(0.02)
    tuned = denoise(model, start, plain(model), plan)
    off = denoise(model, start, plain(model, strength=0.0), plan)
    forgotten = denoise(model, start, plain(model, rule=parse_rule("decoder")), plan)
    torch.testing.assert_close(off, base, atol=1e-4, rtol=1e-4)  # W·x + 0·BAx
    assert (tuned - base).abs().max() > 1e-2 and (forgotten - tuned).abs().max() > 1e-3
    assert torch.equal(tuned, denoise(model, start, plain(model), plan))


def test_a_rule_may_be_any_context_and_is_left_also_when_the_loop_raises():
    model, log = tiny_sd1(), []

    @contextmanager
    def rule(unet):
        log.append(unet is model.unet)
        try:
            yield
        finally:
            log.append("left")

    class Fails(LatentEdit):
        def latents(self, z, step):
            raise RuntimeError("inside an edit")

    with pytest.raises(RuntimeError, match="inside an edit"):
        denoise(model, noise(model), plain(model, rule=rule, latent_edits=(Fails(),)), make_schedule(model, 2))
    assert log == [True, "left"]


def test_the_plan_is_not_used_up():
    model = tiny_sd1()
    plan, start = make_schedule(model, 3, "dpm++_2m"), noise(model)
    assert torch.equal(denoise(model, start, plain(model), plan), denoise(model, start, plain(model), plan))


def test_ddim_by_hand():
    x0, eps, n = torch.tensor(2.0), torch.tensor(3.0), torch.tensor(5.0)
    assert float(ddim(x0, eps, 0.36)) == pytest.approx(0.6 * 2 + 0.8 * 3)
    assert float(ddim(x0, eps, 0.36, 0.8, n)) == pytest.approx(0.6 * 2 + 0.8 * 5)


def test_mistakes_are_named():
    model = tiny_sd1()
    start, edit = noise(model, 1, 2), plain(model)
    with pytest.raises(UserError, match="unknown scheduler 'ddmi'.*ddim, ddpm"):
        make_schedule(model, 3, "ddmi")
    with pytest.raises(UserError, match="only ddim"):
        make_schedule(model, 3, "euler", inverse=True)
    with pytest.raises(UserError, match="leaves no step"):
        make_schedule(model, 3, strength=0.1)
    with pytest.raises(UserError, match="choose 1 to 999"):
        make_schedule(model, 0)
    with pytest.raises(UserError, match="choose 1 to 999"):
        make_schedule(model, 1000)
    with pytest.raises(UserError, match="eta at 0"):
        make_schedule(model, 3, inverse=True, eta=1.0)
    with pytest.raises(UserError, match="multiples of 4"):
        initial_latents(model, [0], (30, 32))
    with pytest.raises(ValueError, match="schedule is empty"):
        denoise(model, start, edit, make_schedule(model, 3)[:0])
    with pytest.raises(ValueError, match="one seed for each"):
        denoise(model, start, edit, make_schedule(model, 3, "euler_a"))
    with pytest.raises(ValueError, match="3 seeds for 2 rows"):
        denoise(model, start, edit, make_schedule(model, 3, "euler_a"), seeds=[1, 2, 3])
    with pytest.raises(ValueError, match="3 rows of conditioning for 2"):
        denoise(model, start, Edit(edit.conditioning.repeat(3), guidance_scale=1), make_schedule(model, 3))
