"""What is saved with --use_ema, what is learned without a caption, and rank-stabilised strength."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.training_utils import EMAModel
from torch import nn

from personalize.adapters.adapter import Adapter
from personalize.errors import UserError
from personalize.formats.inspection import inspect_file
from personalize.formats.inspection_report import report
from personalize.models.stable_diffusion import StableDiffusion
from personalize.training import checkpoints
from personalize.training.averaging import WeightAverage
from personalize.training.config import MultiConceptConfig, SingleImageConfig
from personalize.training.data.concepts import ClassImage
from personalize.training.data.samples import SampleShard
from personalize.training.multi_concept import multi_concept_run
from personalize.training.single_image import single_image_run
from tests.support.runs import CAPTION, SMALL, pixels, same
from tests.support.tiny import tiny
from tests.training.test_multi_concept_run import PICTURE
from tests.training.test_multi_concept_run import SMALL as SMALL_CONCEPTS


def test_the_average_is_that_of_diffusers() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    theirs = EMAModel([parameter], decay=0.7)
    ours = WeightAverage({"weight": parameter}, 0.7)
    for number in range(1, 40):
        with torch.no_grad():
            parameter.copy_(torch.randn(3, generator=torch.Generator().manual_seed(number)))
        theirs.step([parameter])
        ours.update(number)
        assert torch.allclose(ours.values["weight"], theirs.shadow_params[0], atol=1e-6)  # fp32, sums in another order
    with pytest.raises(KeyError), ours.in_place(), ours.in_place():
        assert torch.equal(parameter, ours.values["weight"])
        raise KeyError
    assert not torch.equal(parameter, ours.values["weight"])


def run_of(kind: str, model: StableDiffusion, config: Any) -> Any:
    if kind == "single_image":
        return single_image_run(model, pixels(), CAPTION, config)
    return multi_concept_run(model, PICTURE, config)


EMA: dict[str, SingleImageConfig | MultiConceptConfig] = {
    "single_image": replace(SMALL, max_train_samples=3, use_ema=True),
    "multi_concept": replace(SMALL_CONCEPTS, max_train_steps=3, use_ema=True, ema_max_decay=0.5),
}


@pytest.mark.parametrize("kind", EMA)
def test_the_average_is_saved_and_a_resumed_run_has_the_same(kind: str, tmp_path: Path) -> None:
    model, config = tiny("sd1"), EMA[kind]
    with run_of(kind, model, config) as run:
        states = []
        for report in run.steps():
            states.append({name: p.detach().clone() for name, p in run.objective.trainable().items()})
            if report.update == 2:
                run.save_checkpoint(tmp_path)
        unbroken = run.adapter()
        assert all(torch.equal(p, states[-1][name]) for name, p in run.objective.trainable().items()), "not disturbed"
        decays = [0.0, *(min(config.ema_max_decay, n / (n + 9)) for n in (2, 3))]
        for name, value in run.average.values.items():
            expected = states[0][name]
            for state, decay in zip(states[1:], decays[1:], strict=True):
                expected = decay * expected + (1 - decay) * state[name]
            assert torch.allclose(value, expected, atol=1e-6)
    with run_of(kind, model, config) as run:
        found = checkpoints.find(tmp_path, "latest")
        assert found is not None
        run.resume(found)
        list(run.steps())
        assert same_all(run.adapter(), unbroken)
    with run_of(kind, model, replace(config, use_ema=False)) as run:
        list(run.steps())
        last = run.adapter()
    assert not same_all(last, unbroken) and unbroken.info["config"]["use_ema"]


def same_all(a: Adapter, b: Adapter) -> bool:
    rows = [(a.concepts[t][k], b.concepts[t][k]) for t in a.concepts for k in a.concepts[t]]
    return same(a, b) and all(torch.equal(*row) for row in rows)


def test_rows_in_one_batch_cannot_be_averaged() -> None:
    from personalize.training.batched_adapters import check_batchable

    with pytest.raises(UserError, match="use_ema"):
        check_batchable(replace(SMALL, use_ema=True))


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_share_of_the_samples_has_the_empty_prompt(family: str) -> None:
    """Which ones depends on the number of the sample alone, and class pictures keep their captions."""
    model, config = tiny(family), replace(SMALL, proportion_empty_prompts=0.3)
    classes = [ClassImage("a photo of a dog", PICTURE.image)]
    with single_image_run(model, pixels(), CAPTION, config, class_images=classes) as run:
        (batch,) = next(iter(run.dataset.updates(SampleShard(400), 0, 1)))
        own, prior = batch["dropped"][:400], batch["dropped"][400:]
        assert 0.23 < float(own.float().mean()) < 0.37 and not bool(prior.any())  # 3 standard deviations
        halves = [b["dropped"] for b in next(iter(run.dataset.updates(SampleShard(400, 200), 0, 1)))]
        assert torch.equal(torch.cat([half[:200] for half in halves]), own)
        rows, dropped = torch.tensor([0, 0]), torch.tensor([True, False])
        mixed = run.objective._without_captions(run.objective.conditioning(rows), dropped)
        with torch.no_grad():
            null, plain = model.null(1, run.size), run.objective.conditioning(rows)
        assert torch.allclose(mixed.embeds[0], null.embeds[0]) and torch.equal(mixed.embeds[1], plain.embeds[1])
        if family == "sdxl":
            assert None not in (mixed.pooled, null.pooled, plain.pooled)
            assert torch.allclose(mixed.pooled[0], null.pooled[0]) and torch.equal(mixed.pooled[1], plain.pooled[1])  # pyright: ignore
        losses = [float(report.losses["loss"]) for report in run.steps()]
        assert len(losses) == 4 and all(loss == loss for loss in losses)


def test_all_samples_without_captions_leave_the_source_embedding_as_it_was() -> None:
    config = replace(SMALL, proportion_empty_prompts=1.0, max_train_samples=2)
    with single_image_run(tiny("sd1"), pixels(), CAPTION, config) as run:
        before = run.objective.embeds.detach().clone()
        list(run.steps())
        assert torch.equal(run.objective.embeds, before)


def test_rank_stabilised_strength_is_in_every_file(tmp_path: Path) -> None:
    """peft's rule, alpha / √r; a reader that divides alpha by r, as all do, gets it from the alpha in the file."""
    config = replace(SMALL, rank=4, lora_alpha=6.0, use_rslora=True, max_train_samples=1)
    assert config.alpha / config.rank == pytest.approx(6 / 4**0.5) and config.alpha == 12
    with single_image_run(tiny("sd1"), pixels(), CAPTION, config) as run:
        list(run.steps())
        run.adapter().save(tmp_path / "cat")  # verifies ΔW in the files of every reader
    assert Adapter.load(tmp_path / "cat").alpha == 12
    said = report(inspect_file(tmp_path / "cat" / "pytorch_lora_weights.safetensors"))
    assert "training    Its strength is alpha / √rank" in said
    assert "* Its strength is alpha / √rank" in (tmp_path / "cat" / "README.md").read_text()
    orthogonal = replace(config, orthogonal_start=True)
    assert orthogonal.file_alpha / orthogonal.file_rank == config.alpha / config.rank
    with pytest.raises(UserError, match="full_kv trains no LoRA"):
        MultiConceptConfig(full_kv=True, use_rslora=True)
