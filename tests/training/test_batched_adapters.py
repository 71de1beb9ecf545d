"""Several adapters in one batch: what each would have learned alone, and nothing of one another."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from personalize.adapters import lora
from personalize.adapters.adapter import Adapter
from personalize.errors import UserError
from personalize.models.stable_diffusion import StableDiffusion
from personalize.randomness import generator
from personalize.training.batched_adapters import learn_batched
from personalize.training.config import SingleImageConfig
from personalize.training.finite import NonFiniteError
from personalize.training.single_image import learn, single_image_run
from tests.support.tiny import tiny, tiny_sd1

SMALL = SingleImageConfig(rank=2, max_train_samples=4, samples_per_update=2, learning_rate=1e-3)


def pictures(count: int = 3) -> list[tuple[Tensor, str]]:
    words = ["a red cat", "a blue dog in the park", "a fox on a mountain"]
    drawn = [torch.randn(1, 3, 64, 64, generator=generator(i, "picture")).clamp(-1, 1) for i in range(count)]
    return list(zip(drawn, words, strict=False))


def changes(adapter: Adapter) -> dict[str, Tensor]:
    """ΔW of every module."""
    names = [key.removesuffix(".lora_A.weight") for key in adapter.lora if key.endswith(".lora_A.weight")]
    pairs = {name: (adapter.lora[f"{name}.lora_A.weight"], adapter.lora[f"{name}.lora_B.weight"]) for name in names}
    return {name: b.flatten(1) @ a.flatten(1) for name, (a, b) in pairs.items()}


def test_speed_several_adapters_equal_one_at_a_time() -> None:
    """ΔW within 2e-3, in the median 1e-4: other batch sizes round otherwise, and Adam turns the sign of a gradient near
    zero into a whole step."""
    model = tiny_sd1()
    together = learn_batched(model, pictures(2), SMALL)
    assert not lora.lora_layers(model.unet)  # no trace
    differences = []
    for (adapter, loss), (pixels, caption) in zip(together, pictures(2), strict=True):
        alone = learn(model, pixels, caption, SMALL)
        assert adapter.info == alone.info and adapter.lora.keys() == alone.lora.keys() and 0 < loss < 10
        ours, expected = changes(adapter), changes(alone)
        differences += [float((ours[name] - dw).norm() / dw.norm()) for name, dw in expected.items()]
        assert adapter.source is not None and alone.source is not None
        assert torch.allclose(adapter.source["embeds"], alone.source["embeds"], atol=1e-5)
    assert max(differences) <= 2e-3 and torch.tensor(differences).median() <= 1e-4
    a, b = changes(together[0][0]), changes(together[1][0])
    apart = torch.tensor([float((a[name] - b[name]).norm() / a[name].norm()) for name in a])
    assert apart.median() > 0.05  # they did learn different things


def test_the_loss_of_each_is_the_one_that_it_has_alone() -> None:
    """That of a batch was without min-SNR's weights, so that results.csv had two kinds of loss."""
    model = tiny_sd1()
    config = replace(SMALL, max_train_samples=1, samples_per_update=1, targets="attention", snr_gamma=0.01)
    for (_, together), (pixels, caption) in zip(learn_batched(model, pictures(2), config), pictures(2), strict=True):
        with single_image_run(model, pixels, caption, config) as run:
            (report,) = run.steps()
        assert together == pytest.approx(report.values()["loss"], rel=1e-4) and together < report.values()["mse"] / 2


def test_speed_adapters_of_one_batch_do_not_touch_one_another() -> None:
    """Another neighbour, the very same bits; two updates, for A has no gradient in the first."""
    model, (first, second, third) = tiny_sd1(), pictures()
    config = replace(SMALL, max_train_samples=2, samples_per_update=1, targets="attention")
    one, other = learn_batched(model, [first, second], config), learn_batched(model, [first, third], config)
    assert all(torch.equal(tensor, other[0][0].lora[key]) for key, tensor in one[0][0].lora.items())
    with pytest.raises(NonFiniteError):
        learn_batched(model, [first, (torch.full_like(second[0], torch.nan), "a cat")], config)


def test_speed_several_adapters_on_sdxl() -> None:
    """Linear projections and pooled vectors: a gradient of each adapter equals the one it gets alone."""
    model: StableDiffusion = tiny("sdxl")
    config = replace(SMALL, max_train_samples=2, targets="attention")
    (adapter, _), _ = learn_batched(model, pictures(2), config)
    alone = learn(model, *pictures(1)[0], config)
    ours, expected = changes(adapter), changes(alone)
    differences = torch.tensor([float((ours[name] - dw).norm() / dw.norm()) for name, dw in expected.items()])
    assert differences.max() <= 2e-3 and differences.median() <= 1e-4


@pytest.mark.parametrize("change", [{"max_grad_norm": 1.0}, {"early_stop_loss": 0.03}, {"train_text_encoder": True}])
def test_speed_what_does_not_go_together_is_said(change: dict) -> None:
    with pytest.raises(UserError, match=f"adapters_per_batch does not go with {next(iter(change))}"):
        learn_batched(tiny_sd1(), pictures(2), replace(SMALL, **change))
