"""Runs with a timestep-dependent rank: resumed exactly, and settings that cannot work."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from personalize.adapters import lora
from personalize.adapters.timestep_mask import timestep_mask
from personalize.errors import UserError
from personalize.training.config import MultiConceptConfig, SingleImageConfig
from personalize.training.single_image import learn, single_image_run
from tests.adapters.test_timestep_rank import RULE, SETTINGS
from tests.support.lora_modules import filled
from tests.support.runs import CAPTION, pixels
from tests.support.tiny import tiny_sd1


def test_timestep_rank_resumed_runs_go_on_exactly(tmp_path: Path) -> None:
    from personalize.training import checkpoints

    config = replace(SETTINGS, orthogonal_start=True, max_train_samples=8)
    model = tiny_sd1()
    whole = learn(model, pixels(), CAPTION, config)
    with single_image_run(model, pixels(), CAPTION, config) as run:
        for report in run.steps():
            if report.update == 2:
                run.save_checkpoint(tmp_path)
                break
    with single_image_run(model, pixels(), CAPTION, config) as run:
        for layer in lora.lora_layers(model.unet).values():  # as if another machine had drawn other frames
            with torch.no_grad():
                layer.lora_A[lora.ADAPTER].get_buffer("parametrizations.weight.0.start").mul_(-1)
        checkpoint = checkpoints.find(tmp_path, "latest")
        assert checkpoint is not None
        run.resume(checkpoint)
        list(run.steps())
        resumed = run.adapter()
    assert all(torch.equal(whole.lora[key], resumed.lora[key]) for key in whole.lora)


def test_timestep_rank_settings_that_cannot_work() -> None:
    with pytest.raises(UserError, match="min_rank must be from 1 to the rank, 4"):
        SingleImageConfig(rank=4, min_rank=5)
    with pytest.raises(UserError, match="full_kv trains no LoRA"):
        MultiConceptConfig(full_kv=True, orthogonal_start=True)
    model = tiny_sd1()
    filled(model, rank=3, alpha=3.0)
    with pytest.raises(UserError, match="has rank 3"), timestep_mask(model.unet, RULE):
        pass
