"""Timestep-dependent rank and orthogonal start: masks, gradients, equality with plain LoRA, and what travels."""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import personalize
from personalize.adapters import lora, lora_scales
from personalize.adapters.adapter import Adapter
from personalize.adapters.apply import load_adapters
from personalize.adapters.export import timestep_rank_error, without_timestep_rank
from personalize.adapters.forgetting import parse_rule
from personalize.adapters.merging import merged
from personalize.adapters.timestep_mask import timestep_mask
from personalize.errors import UserError
from personalize.formats.inspection import inspect_file
from personalize.formats.lora_files import factor_pairs
from personalize.formats.timestep_rank import TimestepRank
from personalize.models.stable_diffusion import StableDiffusion
from personalize.randomness import generator
from personalize.training.config import SingleImageConfig
from personalize.training.single_image import single_image_run
from tests.support.lora_modules import answer, filled
from tests.support.runs import CAPTION, pixels
from tests.support.tiny import tiny, tiny_sd1

RULE = TimestepRank(rank=4, min_rank=1)
SETTINGS = SingleImageConfig(
    rank=4, min_rank=1, max_train_samples=4, samples_per_update=2, targets="attention", learning_rate=5e-3
)
ROUNDING = 1e-6  # of outputs of about unit size: one product computed in another order, in each of some layers


def predicted(model: StableDiffusion, timesteps: Tensor | int, rows: int = 2) -> Tensor:
    rng = generator(0, "probe")
    latents = torch.randn(rows, 4, 16, 16, generator=rng)
    with torch.no_grad():
        return model.predict(latents, timesteps, model.prompts(["a cat"] * rows))


def random_adapter(model: StableDiffusion, rank: int = 4) -> Adapter:
    """An adapter with the rule, whose components all matter."""
    filled(model, rank=rank, alpha=float(rank))
    state = lora.lora_state(model.unet)
    lora.remove_lora(model.unet)
    return Adapter(state, rank, float(rank), None, {"base": model.about(), "timestep_rank": RULE.values()})


@pytest.mark.parametrize(
    ("min_rank", "alpha", "expected"),
    [
        (1, 1, [8, 7, 6, 4, 2, 1]),  # e.g. ⌊0.75 · 7⌋ + 1 = 6
        (4, 1, [8, 7, 7, 6, 5, 4]),
        (1, 2, [8, 7, 4, 2, 1, 1]),  # ⌊0.5625 · 7⌋ + 1 = 4
        (4, 2, [8, 7, 6, 5, 4, 4]),
    ],
)
def test_timestep_rank_t1_masks(min_rank: int, alpha: float, expected: list[int]) -> None:
    rule = TimestepRank(8, min_rank, alpha)
    assert [rule.active(t) for t in (0, 1, 250, 500, 750, 999)] == expected
    assert [sum(rule.masks()[t]) for t in (0, 1, 250, 500, 750, 999)] == expected


def test_timestep_rank_t1_whole_products_are_not_rounded_down() -> None:
    assert TimestepRank(101, 1).active(710) == 30  # 0.29 · 100 is 28.999… in floating point
    assert TimestepRank(8, 1).shares()[0] == 1.0
    with pytest.raises(UserError, match="min_rank 9, rank 8"):
        TimestepRank(8, 9)


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_timestep_rank_t2_orthogonal_start_is_the_base_bit_for_bit(name: str) -> None:
    model = tiny(name)
    before = answer(model)
    names = lora.module_names(model.unet, targets="full")
    lora.add_lora(model.unet, names, 4, 4.0, seed=0, orthogonal=True)
    assert torch.equal(answer(model), before) and lora.changes_nothing(model.unet)
    state = lora.lora_state(model.unet)
    lora.remove_lora(model.unet)
    lora.load_lora(model.unet, state, 8, 8.0)  # as a plain LoRA: the halves cancel up to rounding
    torch.testing.assert_close(answer(model), before, atol=2e-6 * float(before.abs().max()), rtol=0)


def test_timestep_rank_t2_factors_are_orthonormal_with_the_smallest_singular_values() -> None:
    model = tiny_sd1()
    lora.add_lora(model.unet, lora.module_names(model.unet), 4, 4.0, seed=0, orthogonal=True)
    for layer in lora.lora_layers(model.unet).values():
        a, b = (part.detach().flatten(1).double() for part in lora._pair(layer))
        p, scales = b[:, :4], b[:, :4].norm(dim=0)
        eye = torch.eye(4, dtype=torch.float64)
        torch.testing.assert_close(a[:4] @ a[:4].T, eye, atol=1e-6, rtol=0)  # fp32 entries
        torch.testing.assert_close((p.T @ p), torch.diag(scales.square()), atol=1e-6, rtol=0)
        assert bool((scales[:-1] >= scales[1:]).all())  # the last of a falling sequence
        short, long = sorted((len(b), a.shape[1]))
        assert float(scales[0]) < 0.25 * (short**0.5 + long**0.5)  # far from the largest, about (√m + √n) / r


def gradients(model: StableDiffusion, timesteps: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    latents = torch.randn(len(timesteps), 4, 16, 16, generator=generator(1, "probe"))
    loss = model.predict(latents, timesteps, model.prompts(["a cat"] * len(timesteps))).square().mean()
    layers = lora.lora_layers(model.unet)
    parameters = [parameter for layer in layers.values() for parameter in lora.factor_parameters(layer)[:2]]
    found = torch.autograd.grad(loss, parameters)
    return dict(zip(layers, zip(found[::2], found[1::2], strict=True), strict=True))


@pytest.mark.parametrize("orthogonal", [False, True])
def test_timestep_rank_t3_a_masked_component_has_no_gradient(orthogonal: bool) -> None:
    model = tiny_sd1()
    names = lora.module_names(model.unet, targets="full")
    lora.add_lora(model.unet, names, 4, 4.0, seed=0, orthogonal=orthogonal)
    with timestep_mask(model.unet, RULE):
        found = gradients(model, torch.tensor([999, 600]))  # 1 and 2 of 4 components
    for name, (a, b) in found.items():
        assert not a[2:].any() and not b[:, 2:].any(), name
        assert bool(b[:, :2].flatten(2).any(2).any(0).all() if b.ndim == 4 else b[:, :2].any(0).all()), name
        assert bool(a[:2].flatten(1).any(1).all()) == orthogonal, name  # B = 0 leaves A without a gradient


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_timestep_rank_t4_a_batch_of_mixed_timesteps_equals_its_samples(name: str) -> None:
    model = tiny(name)
    filled(model, rank=4, alpha=4.0)
    times = torch.tensor([30, 980])
    with timestep_mask(model.unet, RULE):
        both = predicted(model, times)
        latents = torch.randn(2, 4, 16, 16, generator=generator(0, "probe"))
        with torch.no_grad():
            alone = [model.predict(latents[i : i + 1], times[i], model.prompts(["a cat"])) for i in range(2)]
    unmasked = predicted(model, times)
    torch.testing.assert_close(both, torch.cat(alone), atol=2e-6 * float(both.abs().max()), rtol=0)
    assert float((unmasked - both)[1].abs().max()) > 1e-2 * float(both.abs().max())


def test_timestep_rank_t4_masks_hold_where_peft_computes_the_sum() -> None:
    model = tiny_sd1()
    filled(model, rank=4, alpha=4.0)
    with timestep_mask(model.unet, RULE):
        expected = predicted(model, torch.tensor([30, 980]))
        for layer in lora.lora_layers(model.unet).values():
            layer._plain = lambda *_: None  # pyright: ignore  # as on a base in 4 bits
        found = predicted(model, torch.tensor([30, 980]))
    torch.testing.assert_close(found, expected, atol=1e-5 * float(expected.abs().max()), rtol=0)


def test_timestep_rank_t5_the_plain_lora_of_twice_the_rank_is_the_same() -> None:
    model = tiny_sd1()
    config = replace(SETTINGS, orthogonal_start=True)
    with single_image_run(model, pixels(), CAPTION, config) as run:
        list(run.steps())
        adapter = run.adapter()
        for name, layer in lora.lora_layers(model.unet).items():
            q, p, scales = (part.detach() for part in lora.factor_parameters(layer))
            a, b = adapter.lora[f"unet.{name}.lora_A.weight"], adapter.lora[f"unet.{name}.lora_B.weight"]
            change = (p * scales) @ q + b[:, 4:] @ a[4:]
            torch.testing.assert_close(b @ a, change, atol=1e-6, rtol=0)  # weights are of size 0.1
        expected = predicted(model, torch.tensor([20, 900]))
    assert (adapter.rank, adapter.alpha, len(adapter.info["timestep_rank"])) == (8, 8.0, 4)
    with adapter.apply(model):
        found = predicted(model, torch.tensor([20, 900]))
    torch.testing.assert_close(found, expected, atol=1e-5 * float(expected.abs().max()), rtol=0)
    assert float((found - predicted(model, torch.tensor([20, 900]))).abs().max()) > 1e-3


def test_timestep_rank_t6_forgetting_strength_and_the_rule_multiply_in_any_order() -> None:
    model = tiny_sd1()
    filled(model, rank=4, alpha=4.0)
    rules = {
        "rule": lambda: timestep_mask(model.unet, RULE),
        "forget": lambda: lora_scales.scaled(model.unet, [parse_rule("decoder=0.5")]),
        "strength": lambda: lora_scales.scaled(model.unet, strength=0.7),
    }
    outputs = []
    for order in (("rule", "forget", "strength"), ("strength", "forget", "rule"), ("forget", "rule", "strength")):
        with ExitStack() as stack:
            for name in order:
                stack.enter_context(rules[name]())
            outputs.append(predicted(model, torch.tensor([100, 900])))
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
    with rules["rule"]():
        assert not torch.allclose(outputs[0], predicted(model, torch.tensor([100, 900])), atol=1e-3)


@pytest.mark.parametrize("name", ["sd1", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_timestep_rank_t7_saved_loaded_and_attached_the_rule_holds_at_each_step(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    adapter = random_adapter(model)
    folder = adapter.save(tmp_path / "mine")
    loaded, file = Adapter.load(folder), Adapter.load(folder / "mine.safetensors")
    assert loaded.timestep_rank == RULE == file.timestep_rank
    with loaded.apply(model):
        expected = {t: predicted(model, t) for t in (981, 501, 21)}
    pipe, seen = tiny(name).pipeline(), {}
    unet_forward = pipe.unet.forward

    def spy(sample: Tensor, timestep: Tensor, *args: object, **kwargs: object) -> object:
        out = unet_forward(sample, timestep, *args, **kwargs)
        seen[int(timestep)] = (sample, {"encoder_hidden_states": kwargs["encoder_hidden_states"],
                                        "added_cond_kwargs": kwargs.get("added_cond_kwargs")}, out[0])  # fmt: skip
        return out

    with personalize.attach(pipe, folder):
        attached = StableDiffusion.from_pipeline(pipe)
        for t, want in expected.items():
            torch.testing.assert_close(predicted(attached, t), want, atol=1e-5 * float(want.abs().max()), rtol=0)
        pipe.unet.forward = spy
        pipe("a cat", num_inference_steps=3, output_type="latent", height=64, width=64)
        del pipe.unet.forward
    assert len(seen) == 3
    for t, (sample, given, out) in seen.items():  # each step's prediction is that of the components active there
        by_hand = tiny(name)
        part = _only(adapter, RULE.active(t))
        lora.load_lora(by_hand.unet, part.lora, part.rank, part.alpha)
        with torch.no_grad():
            want = by_hand.unet(sample, torch.tensor(t), **given).sample
        torch.testing.assert_close(out, want, atol=1e-5 * float(want.abs().max()), rtol=0)


def _only(adapter: Adapter, count: int) -> Adapter:
    """The adapter with its first `count` components alone, by zeros in B."""
    state = dict(adapter.lora)
    for key in (key for key in state if ".lora_B." in key):
        state[key] = state[key].clone()
        state[key][:, count:] = 0
    return replace(adapter, lora=state)


def _changes(adapter: Adapter) -> list[Tensor]:
    return [b.flatten(1) @ a.flatten(1) for a, b in factor_pairs(adapter.lora).values()]


def test_timestep_rank_card_and_inspection_say_it(tmp_path: Path) -> None:
    folder = random_adapter(tiny_sd1()).save(tmp_path / "mine")
    sentence = "timestep-dependent rank: 1 of 4 components at the highest noise"
    assert sentence in (folder / "README.md").read_text()
    for name in ("mine.safetensors", "pytorch_lora_weights.safetensors"):
        assert any(sentence in problem for problem in inspect_file(folder / name).problems), name


def test_timestep_rank_exports_one_change_for_all_timesteps_and_says_what_it_costs() -> None:
    model = tiny_sd1()
    adapter = random_adapter(model)
    full, share = (without_timestep_rank(adapter, how) for how in ("full", "share"))
    assert (
        full.timestep_rank is None and share.timestep_rank is None and share.info["baked"]["timestep_rank"] == "share"
    )
    missed, whole = {"full": 0.0, "share": 0.0}, 0.0
    changes = {"full": _changes(full), "share": _changes(share)}
    for t in range(25, 1000, 50):
        exact = _changes(_only(adapter, RULE.active(t)))
        whole += sum(float(change.square().sum()) for change in exact)
        for how, constant in changes.items():
            pairs = zip(constant, exact, strict=True)
            missed[how] += sum(float((other - change).square().sum()) for other, change in pairs)
    for how, value in missed.items():  # 20 timesteps in place of 1000
        assert timestep_rank_error(adapter, how) == pytest.approx((value / whole) ** 0.5, rel=0.05)
    assert timestep_rank_error(adapter, "share") < 0.7 * timestep_rank_error(adapter, "full")
    with pytest.raises(UserError, match="no single sum expresses"):
        merged([adapter, adapter], [1, 1], ["a", "b"])


def test_adapters_that_are_applied_together_keep_each_its_own_rule(tmp_path: Path) -> None:
    """At every timestep the sum predicts what the sum of the components that then take part predicts."""
    model = tiny_sd1()
    first, plain = random_adapter(model), replace(random_adapter(model, 3), info={"base": model.about()})
    fewer = {key: value for key, value in first.lora.items() if "attn2" not in key}  # a part that lacks modules
    assert 0 < len(fewer) < len(first.lora)
    rule = TimestepRank(rank=4, min_rank=2, alpha=2.0)
    last = replace(first, lora=fewer, info={**first.info, "timestep_rank": rule.values()})
    folders = [one.save(tmp_path / str(number)) for number, one in enumerate((plain, first, last))]
    together = load_adapters(folders)
    assert (together.rank, len(together.lora)) == (11, len(first.lora)) and together.timestep_rank is not None
    assert {len(row) for row in together.timestep_rank.masks()} == {11}
    for t in (981, 501, 21):
        parts = [plain, _only(first, RULE.active(t)), _only(last, rule.active(t))]
        with merged([replace(one, info=plain.info) for one in parts], [1, 1, 1], "abc").apply(model):
            expected = predicted(model, t)
        with together.apply(model):
            found = predicted(model, t)
        torch.testing.assert_close(found, expected, atol=1e-5 * float(expected.abs().max()), rtol=0)
    with pytest.raises(UserError, match="no file holds constant rank"):
        together.save(tmp_path / "sum")


def test_timestep_rank_leaves_no_trace() -> None:
    model = tiny_sd1()
    hooks = len(model.unet._forward_pre_hooks)
    with pytest.raises(RuntimeError), single_image_run(model, pixels(), CAPTION, SETTINGS):
        raise RuntimeError
    assert len(model.unet._forward_pre_hooks) == hooks and not lora.lora_layers(model.unet)
    filled(model, rank=4, alpha=4.0)
    before = answer(model)
    with timestep_mask(model.unet, RULE):
        answer(model)
    assert torch.equal(answer(model), before)
