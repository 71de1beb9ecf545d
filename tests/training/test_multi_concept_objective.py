"""The objective of several concepts: the maps it reads, and where its gradient goes."""

from typing import Any

import pytest
import torch
from torch import Tensor

from personalize.adapters.lora import add_lora, lora_parameters, remove_lora
from personalize.adapters.merging import low_rank
from personalize.adapters.subjects import Subject
from personalize.adapters.textual_inversion import initial_embeddings, installed_tokens, locate_subjects
from personalize.errors import UserError
from personalize.models.attention import attention_sites, hooked
from personalize.models.attention_maps import CalibrationMaps, MapStore, calibration_layers
from personalize.models.map_filters import normalised, smoothed
from personalize.training.losses import calibration, masked_mse
from personalize.training.multi_concept_objective import (
    DetachedStart,
    MultiConceptObjective,
    full_weights,
    text_projections,
)
from tests.support.tiny import tiny

CAT, DOG = Subject("<cat1>", "cat"), Subject("<dog1>", "dog")
TEXT = "photo of a <cat1> cat and <dog1> dog"
FIVE = ["down_blocks.2.attentions.0", "down_blocks.2.attentions.1", *(f"up_blocks.1.attentions.{i}" for i in range(3))]


def batch(model: Any, side: int = 64, rows: int = 1, prior: int = 0) -> dict[str, Any]:
    """A fixed batch of `rows` instance and `prior` regularisation samples; needs the tokens in the model."""
    rng = torch.Generator().manual_seed(0)
    count = rows + prior
    places = locate_subjects(model, TEXT, [CAT, DOG])
    length = model.tokenizers[0].model_max_length
    nouns, modifiers = torch.zeros(2, count, 2, length)
    for index, place in enumerate(places):
        nouns[:rows, index, list(place.noun)] = 1
        modifiers[:rows, index, list(place.modifier)] = 1
    return {
        "latents": torch.randn(count, 4, side, side, generator=rng),
        "noise": torch.randn(count, 4, side, side, generator=rng),
        "timesteps": torch.tensor([300, 700, 100, 900])[:count],
        "texts": [TEXT] * rows + ["photo of a cat and dog"] * prior,
        "instance": torch.tensor([True] * rows + [False] * prior),
        "canvas": torch.ones(count, 1, side, side),
        "nouns": nouns,
        "modifiers": modifiers,
    }


def made(model: Any, rows: Any, **options: Any) -> MultiConceptObjective:
    add_lora(model.unet, text_projections(model.unet), 2, 2, seed=0)
    return MultiConceptObjective(model, rows, **options)


def tokens(model: Any) -> dict[str, dict[str, Tensor]]:
    return {subject.token: initial_embeddings(model, subject) for subject in (CAT, DOG)}


def sized(name: str, side: int) -> Any:
    """A tiny base for latents of `side`: at 64, SD 1.x has its 16×16 maps where the published model has them."""
    model = tiny(name)
    model.unet.register_to_config(sample_size=side)
    return model


def test_disendiff_d_five_layers_at_the_published_places() -> None:
    model = sized("sd1", 64)
    names = calibration_layers(model.unet, (64, 64))
    assert names == [f"{place}.transformer_blocks.0.attn2" for place in FIVE]
    assert calibration_layers(model.unet, (96, 96)) == names  # 24×24, pooled; "256 queries" would find none
    sites = attention_sites(model.unet, (96, 96))
    assert not [site for site in sites.values() if site.height * site.width == 256]  # companion, naive


def test_disendiff_d_sdxl_takes_one_block_of_each_row() -> None:
    names = calibration_layers(tiny("sdxl").unet, (64, 64))
    assert len(names) == 5 and len({name.rpartition(".transformer_blocks.")[0] for name in names}) == 5
    with pytest.raises(UserError, match="at least 4"):
        calibration_layers(tiny("sd1").unet, (3, 3))


def test_disendiff_d_maps_are_distributions_with_gradient_and_change_no_output() -> None:
    model = sized("sd1", 32)
    with installed_tokens(model, tokens(model), trainable=True) as rows:
        objective = made(model, rows)
        given = batch(model, side=32)
        question = given["latents"], given["timesteps"], model.prompts(given["texts"])
        store = CalibrationMaps(calibration_layers(model.unet, (32, 32)))
        plain = model.predict(*question)
        with hooked(model.unet, [store]):
            read = model.predict(*question)
        torch.testing.assert_close(read, plain, atol=1e-5, rtol=0)  # explicit and fused softmax differ in rounding
        assert len(store.maps) == 5
        for maps in store.maps.values():
            assert maps.shape == (1, 2, 256, 77) and maps.requires_grad
            torch.testing.assert_close(maps.sum(-1), torch.ones(1, 2, 256), atol=1e-5, rtol=0)
        assert store.of_tokens(given["nouns"]).shape == (1, 2, 16, 16)
        assert objective(given).parts.keys() == {"mse", "calibration"}


def gradients(objective: MultiConceptObjective, loss: Tensor) -> dict[str, Tensor]:
    objective.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}


def test_disendiff_d_gradient_checkpointing_changes_no_gradient_and_stores_no_second_set() -> None:
    model = sized("sd1", 16)
    with installed_tokens(model, tokens(model), trainable=True) as rows:
        objective = made(model, rows, calibration_weight=1.0)
        given = batch(model, side=16)
        plain = gradients(objective, objective(given).total)
        model.unet.enable_gradient_checkpointing()
        model.unet.train()
        again = gradients(objective, objective(given).total)
        assert plain.keys() == again.keys()
        for name, gradient in plain.items():
            torch.testing.assert_close(again[name], gradient, atol=1e-6, rtol=1e-5)  # the same operations twice
        store = CalibrationMaps(calibration_layers(model.unet, (16, 16)))
        with hooked(model.unet, [store]):
            model.predict(given["latents"], given["timesteps"], model.prompts(given["texts"]))
        loss = store.of_tokens(given["nouns"]).sum()
        loss.backward()
        assert len(store.maps) == 5


def test_disendiff_e_gradient_reaches_lora_and_tokens_and_nothing_else() -> None:
    model = sized("sd1", 16)
    before = {name: p.detach().clone() for name, p in model.text_encoders[0].named_parameters()}
    unet = {name: p.detach().clone() for name, p in model.unet.named_parameters()}
    with installed_tokens(model, tokens(model), trainable=True) as rows:
        objective = made(model, rows, calibration_weight=0.01)
        given = batch(model, side=16)
        gradient_by_name = gradients(objective, objective(given).total)
        assert len(gradient_by_name) == 64 + 1 == len(objective.trainable())
        optimizer = torch.optim.AdamW(objective.groups(1e-2, 1e-2, 0.01))
        for _ in range(2):
            optimizer.zero_grad()
            objective(given).total.backward()
            optimizer.step()
        moving = [name for name in calibration_layers(model.unet, (16, 16))]
        grads = {n: p.grad for n, p in model.unet.named_parameters() if p.grad is not None}
        for name in moving:
            for part in ("to_k", "to_v"):
                for side in "AB":
                    assert bool(grads[f"{name}.{part}.lora_{side}.personalize.weight"].any()), (name, part, side)
    remove_lora(model.unet)
    for module, values in ((model.text_encoders[0], before), (model.unet, unet)):
        after = dict(module.named_parameters())
        assert all(torch.equal(after[name], value) for name, value in values.items())


def test_disendiff_e_attention_alone_reaches_nineteen_tensors_at_the_first_step() -> None:
    """to_k of the ten cross-attention layers up to the last captured one, to_v of the first nine; A has none."""
    model = sized("sd1", 64)
    with installed_tokens(model, tokens(model), trainable=True) as rows:
        objective = made(model, rows, calibration_weight=1.0)
        given = batch(model)
        store = CalibrationMaps(calibration_layers(model.unet, (64, 64)))
        with hooked(model.unet, [DetachedStart(), store]):
            model.predict(given["latents"], given["timesteps"], model.prompts(given["texts"]))
        nouns, modifiers = (store.of_tokens(given[key])[0] for key in ("nouns", "modifiers"))
        gradient_by_name = gradients(objective, calibration(nouns, modifiers))
        reached = [name for name, gradient in gradient_by_name.items() if "lora" in name and bool(gradient.any())]
        assert len(reached) == 19 and all(".lora_B." in name for name in reached)
        assert sum("to_k" in name for name in reached) == 10


def test_disendiff_e_start_mark_is_detached_and_companion() -> None:
    """With a text of the start mark alone the adapter learns nothing; naive, without the detachment, it does."""
    model = sized("sd1", 16)
    add_lora(model.unet, text_projections(model.unet), 2, 2, seed=0)
    given = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    conditioning = model.prompts(["a cat"])
    conditioning = type(conditioning)(conditioning.embeds[:, :1].detach())
    with hooked(model.unet, [DetachedStart()]):
        loss = model.predict(given, 500, conditioning).square().mean()
    assert not loss.requires_grad or not _reached(model, loss)
    loss = model.predict(given, 500, conditioning).square().mean()
    assert _reached(model, loss)


def _reached(model: Any, loss: Tensor) -> bool:
    parameters = lora_parameters(model.unet)
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    return any(grad is not None and bool(grad.any()) for grad in grads)


@pytest.mark.slow  # 42 updates
def test_disendiff_g_attention_loss_falls_on_a_fixed_batch() -> None:
    """It rises first: binding lets no gradient into the class maps, which separation moves away meanwhile."""
    model = sized("sd1", 16)
    with installed_tokens(model, tokens(model), trainable=True) as rows:
        objective = made(model, rows, calibration_weight=1.0)
        given = batch(model, side=16)
        given["canvas"] = torch.zeros_like(given["canvas"])  # no diffusion loss: attention alone
        optimizer = torch.optim.AdamW(objective.groups(5e-3, 5e-2, 0.0))
        losses = []
        for _ in range(42):
            terms = objective(given)
            optimizer.zero_grad()
            terms.total.backward()
            optimizer.step()
            losses.append(float(terms.parts["calibration"]))
        assert losses[-1] < 0.97 * losses[0]


@pytest.mark.parametrize("name", ["sd1", "sd2v", "sdxl"])
def test_every_family_trains_with_regularisation_and_masks(name: str) -> None:
    model = tiny(name)
    with installed_tokens(model, tokens(model), trainable=True) as rows:
        objective = made(model, rows, mask_weight=0.1)
        given = batch(model, side=16, rows=1, prior=1)
        given["masks"] = torch.ones(2, 2, 64, 64)
        terms = objective(given)
        terms.total.backward()
        assert bool(terms.total.isfinite()) and terms.parts.keys() == {"mse", "calibration", "anchoring"}
        assert all(p.grad is not None for p in objective.rows)


def test_weight_zero_reads_no_map_and_regularisation_alone_has_no_attention_loss(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = sized("sd1", 16)
    with installed_tokens(model, tokens(model), trainable=True) as rows:
        plain = made(model, rows, calibration_weight=0.0)
        given = batch(model, side=16, rows=1, prior=1)
        expected = plain(given)
        plain.calibration_weight = 1.0
        assert bool(plain(given).total > expected.total)
        alone = {key: value[1:] for key, value in given.items()}
        lost = plain(alone)  # the part is named all the same: processes add up parts by name
        assert float(lost.parts["calibration"]) == 0
        plain.calibration_weight = 0.0
        monkeypatch.setattr(MapStore, "probs", lambda *_: pytest.fail("a map was read"))
        assert torch.equal(plain(given).total, expected.total)


def test_half_precision_reads_the_same_loss_up_to_rounding() -> None:
    model = sized("sd1", 16)
    with installed_tokens(model, tokens(model), trainable=True) as rows:
        objective = made(model, rows)
        given = batch(model, side=16)
        whole = objective(given).parts["calibration"]
        with torch.autocast("cpu", torch.bfloat16):
            half = objective(given).parts["calibration"]
        assert half.dtype == torch.float32 and abs(float(half - whole)) < 0.3 * float(whole)  # of a random UNet's maps


def test_canvas_and_prior_weight() -> None:
    output, target = torch.zeros(1, 4, 2, 2), torch.ones(1, 4, 2, 2)
    target[..., 0] = 100
    canvas = torch.tensor([[[[0.0, 1.0], [0.0, 1.0]]]])
    assert float(masked_mse(output, target, canvas)) == 1
    assert float(masked_mse(output, target, torch.ones(1, 1, 2, 2))) == pytest.approx(float(target.square().mean()))


def test_full_weights_are_put_back_and_low_rank_tells_what_it_misses() -> None:
    model = tiny("sd1")
    names = text_projections(model.unet)
    assert len(names) == 32
    weights = {name: model.unet.get_submodule(name).weight for name in names}
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    with full_weights(model.unet) as base, torch.no_grad():
        for index, weight in enumerate(weights.values()):
            weight += torch.outer(torch.ones(len(weight)), torch.ones(weight.shape[1])) * (index + 1)
        changes = {name: weights[name] - base[name] for name in names}
    assert all(torch.equal(weights[name], before[name]) for name in names)
    state, missed = low_rank(changes, 2)
    assert missed < 1e-5 and len(state) == 64
    for name in names[:2]:
        rebuilt = state[f"unet.{name}.lora_B.weight"] @ state[f"unet.{name}.lora_A.weight"]
        torch.testing.assert_close(rebuilt, changes[name], atol=1e-4, rtol=1e-4)
    random = {"x": torch.randn(6, 6, generator=torch.Generator().manual_seed(0))}
    factors, missed = low_rank(random, 2)
    rest = random["x"] - factors["unet.x.lora_B.weight"] @ factors["unet.x.lora_A.weight"]
    assert missed == pytest.approx(float(rest.norm() / random["x"].norm()), abs=1e-5) and missed > 0.1


def test_smoothed_maps_stay_in_range() -> None:
    maps = smoothed(normalised(torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(0))))
    assert 0 <= float(maps.min()) and float(maps.max()) <= 1
