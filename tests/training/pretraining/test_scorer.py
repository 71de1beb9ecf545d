"""How the package's scorer is trained."""

from __future__ import annotations

import json

import pytest
import torch
from accelerate.state import AcceleratorState

from personalize.cli.launch import load_script, scripts_home
from personalize.embedded.scenes import NOUNS, STYLES, Scene, SceneObject
from personalize.evaluation.scene_scorer import SceneScorer, ScorerNet
from personalize.randomness import generator
from personalize.training.pretraining.scorer import (
    NOTHING,
    ScorerData,
    ScorerObjective,
    degraded,
    labelled,
    rendered,
    transformed,
)

SCRIPT = load_script(scripts_home() / "train" / "scorer.py")


def test_cells_are_labelled_with_what_covers_them():
    scene = Scene("beach", (SceneObject("cat", "3d", 0.25, 0.5, 0.4), SceneObject("dog", "flat", 0.75, 0.5, 0.4)))
    pixels, cells, _ = labelled(scene)
    cat, dog = (1 + NOUNS.index(n) * 4 + list(STYLES).index(s) for n, s in (("cat", "3d"), ("dog", "flat")))
    assert pixels.shape == (3, 128, 128) and set(cells.unique().tolist()) == {NOTHING, cat, dog}
    assert cells[4, 2] == cat and cells[4, 6] == dog and cells[0, 0] == NOTHING


def test_pictures_move_with_their_labels():
    pixels, cells = -torch.ones(64, 3, 64, 64), torch.zeros(64, 8, 8, dtype=torch.int64)
    pixels[:, :, 16:40, 8:32], cells[:, 2:5, 1:4] = 1.0, 5
    transformed_pixels, labels = transformed(pixels, cells, generator(0, "test"))
    brightness = torch.nn.functional.avg_pool2d(transformed_pixels[:, :1], 8)[:, 0]
    agree = ((brightness > 0) == (labels == 5)).float().mean()
    assert agree > 0.93  # the border of 12 of 64 cells may fall either way
    assert (labels[:, :, 4:] == 5).any() and (labels[:, :, :4] == 5).any(), "some are mirrored, some not"


def test_degraded_pictures_differ_and_stay_in_range():
    pixels = rendered("test", range(8))["pixels"].float() / 127.5 - 1
    bad = degraded(pixels, generator(0, "test"))
    assert bad.shape == pixels.shape and bad.abs().max() <= 1 and 0.01 < (bad - pixels).abs().mean() < 0.3


def test_a_few_updates_bring_the_loss_down():
    torch.manual_seed(0)
    data = ScorerData(**rendered("test", range(16)), seed=0)
    objective = ScorerObjective(ScorerNet((8, 16, 24)))
    optimizer = torch.optim.AdamW(objective.parameters(), 3e-3)
    losses = []
    for update in range(20):
        loss = objective(data.batch(update, range(16))).total
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]  # 0.71 when written: twenty updates of a network this small
    again = data.batch(3, range(16))["pixels"]
    assert torch.equal(again, data.batch(3, range(16))["pixels"]), "a sample is always degraded in the same way"


@pytest.fixture
def fresh_accelerator():
    """Accelerate keeps the precision of a process's first accelerator: here, of another test's."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_the_command_resumes_and_writes_weights_with_their_accuracy(tmp_path, capsys, monkeypatch, fresh_accelerator):
    options = {"scenes": 12, "autoencoded": 0, "test_scenes": 5, "widths": (8, 8, 8), "train_batch_size": 4,
               "checkpointing_steps": 2}  # fmt: skip
    whole = SCRIPT.main(SCRIPT.Config(tmp_path / "whole", max_train_steps=4, **options))
    info = SceneScorer.load(whole).info
    assert info["report"]["rendered"]["n"] == 5 and info["settings"]["train_split"] == "scorer-train"
    broken = SCRIPT.Config(tmp_path / "broken", max_train_steps=4, **options)
    state = torch.load(tmp_path / "whole" / "scorer.pt", weights_only=True)
    assert state["update"] == 4
    real = torch.save

    def save(value, path):
        real(value, path)
        if "update" in value:  # the first checkpoint
            path.replace(path.with_suffix(".pt"))
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch, "save", save)
        SCRIPT.main(broken)
    resumed = SCRIPT.main(broken)
    assert resumed.read_bytes() == whole.read_bytes(), "a broken run that goes on ends where an unbroken one does"
    assert json.loads(capsys.readouterr().out.strip().splitlines()[-1])["rendered"]["n"] == 5
