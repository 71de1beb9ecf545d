"""The objective of single-image tuning: what it starts from, its target, its weights."""

import pytest
import torch

from personalize.adapters.lora import lora_layers
from personalize.adapters.lora_scales import scaled
from personalize.training.data.samples import SampleShard
from personalize.training.single_image_objective import SingleImageObjective
from tests.support.objectives import CAPTION, objective
from tests.support.samples import picture
from tests.support.tiny import tiny, tiny_sd1


def test_forgedit_c18_the_source_starts_as_the_captions_encoding() -> None:
    for name in ("sd1", "sdxl"):
        model = tiny(name)
        with torch.no_grad():
            conditioning = model.prompts([CAPTION])
        single = objective(model)
        assert torch.equal(single.embeds, conditioning.embeds)
        assert (single.pooled is None) == (conditioning.pooled is None)
        if conditioning.pooled is not None:
            assert torch.equal(single.pooled, conditioning.pooled) and single.pooled.requires_grad  # pyright: ignore


def test_standalone_leaves_the_source_alone() -> None:
    single = objective(tiny_sd1(), standalone=True)
    assert len(single.groups(1e-3, 1e-3)) == 1 and "embeds" not in single.trainable()


def test_forgedit_c24_prediction_type(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("sd2v")
    single, batch = objective(model), next(picture().batches(SampleShard(2), 0, 1))
    velocity = model.target(batch["latents"], batch["noise"], batch["timesteps"])
    monkeypatch.setattr(model, "predict", lambda *args: velocity)
    assert single(batch).total == 0
    monkeypatch.setattr(model, "predict", lambda *args: batch["noise"])
    assert single(batch).total > 0.1  # ε in the place of v is wrong


def test_min_snr_weights_follow_the_prediction_type(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = {name: value.clone() for name, value in next(picture().batches(SampleShard(1), 0, 1)).items()}
    batch["timesteps"][:] = 0
    for name, divisor in (("sd1", 0.0), ("sd2v", 1.0)):
        model = tiny(name)
        alpha = model.alphas_cumprod[0]
        snr = alpha / (1 - alpha)
        monkeypatch.setattr(model, "predict", lambda *args: torch.zeros_like(batch["latents"]))
        terms = objective(model, snr_gamma=5.0)(batch)
        assert torch.allclose(terms.total / terms.parts["mse"], 5 / (snr + divisor))


def test_objective_needs_an_adapter() -> None:
    model = tiny_sd1()
    with torch.no_grad(), pytest.raises(ValueError, match="no adapter"):
        SingleImageObjective(model, model.prompts([CAPTION]))


def test_forgedit_c17_training_sees_scales_too() -> None:
    model = tiny_sd1()
    single, batch = objective(model), next(picture().batches(SampleShard(1), 0, 1))
    with torch.no_grad():
        for layer in lora_layers(model.unet).values():
            layer.lora_B["personalize"].weight.fill_(0.1)  # pyright: ignore
        learned = single(batch).total
        with scaled(model.unet, strength=0.0):
            assert single(batch).total != learned


def test_masks_and_class_pictures_in_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_sd1()
    with torch.no_grad():
        conditioning = model.prompts(["a cat", "a dog"])
    single = objective(model, prior=conditioning[1:], prior_loss_weight=0.5)
    zero = torch.zeros(2, 4, 8, 8)
    errors = torch.ones(2, 4, 8, 8)
    errors[0, :, :4], errors[1] = 3.0, 5.0
    monkeypatch.setattr(model, "predict", lambda *args: errors)
    weights = torch.ones(2, 1, 8, 8)
    weights[0, :, 4:] = 0.25
    batch = {"latents": zero, "noise": zero, "timesteps": torch.tensor([3, 4]), "rows": torch.tensor([0, 1])}
    terms = single(batch | {"weights": weights})
    own = (9 * 1 + 1 * 0.25) / 1.25  # a weighted mean, which a mask that is white everywhere leaves as it is
    assert torch.allclose(terms.total, torch.tensor(own + 0.5 * 25)) and float(terms.parts["prior"]) == 25
    assert torch.allclose(single(batch).parts["mse"], torch.tensor((9 + 1) / 2))
