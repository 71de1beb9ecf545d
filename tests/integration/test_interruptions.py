"""Training ended by force at any moment goes on to the same bits; several processes are one with a larger batch."""

from __future__ import annotations

import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from personalize.io.atomic import write_file
from personalize.io.tensor_files import read_tensors, tensor_bytes
from personalize.training import checkpoints
from personalize.training import single_image as learning_module
from personalize.training.config import SingleImageConfig
from personalize.training.data.samples import LatentDataset
from personalize.training.single_image import SingleImageRun, single_image_run
from tests.support.children import in_child, run_processes, start_child
from tests.support.runs import CAPTION, pixels
from tests.support.tiny import tiny_sd1

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
SMALL = SingleImageConfig(rank=2, max_train_samples=4, samples_per_update=1, targets="attention")


@pytest.fixture(scope="module")
def model():
    return tiny_sd1()


@pytest.fixture(autouse=True)
def few_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """One in sixteen: adding them takes longest of all here."""
    everywhere = learning_module.module_names
    monkeypatch.setattr(learning_module, "module_names", lambda *wanted: everywhere(*wanted)[::16])


def small_pixels() -> Tensor:
    return torch.nn.functional.interpolate(pixels(), size=(32, 32))


def written(run: SingleImageRun, path: Path) -> None:
    adapter = run.adapter()
    write_file(path, tensor_bytes({**adapter.lora, **(adapter.source or {})}))


def trained(model, folder: Path, config: SingleImageConfig = SMALL) -> int:
    """Train in `folder`, from its latest checkpoint on, with a checkpoint after every update; where it began."""
    with single_image_run(model, small_pixels(), CAPTION, config) as run:
        found = checkpoints.find(folder, "latest")
        if found is not None:
            run.resume(found)
        first = run.update
        for _ in run.steps():
            run.save_checkpoint(folder, 2)
        written(run, folder / "final.safetensors")
    return first


@pytest.mark.parametrize("count", [5, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_killed_at_any_moment_goes_on_to_the_same_bits(model, tmp_path: Path, count: int) -> None:
    started = time.monotonic()
    in_child(lambda: trained(model, tmp_path / "whole"))
    length, draw = time.monotonic() - started, random.Random(0)
    expected = (tmp_path / "whole" / "final.safetensors").read_bytes()
    seen = set()
    for number in range(count):
        folder = tmp_path / f"broken-{number}"
        child = start_child(lambda folder=folder: trained(model, folder))
        time.sleep(length * (number + draw.random()) / count)  # a moment in each part of the run
        os.kill(child.process, signal.SIGKILL)  # pyright: ignore[reportFunctionMemberAccess]
        os.waitpid(child.process, 0)  # pyright: ignore[reportFunctionMemberAccess]
        first, _ = in_child(lambda folder=folder: trained(model, folder))
        seen.add(first)
        assert (folder / "final.safetensors").read_bytes() == expected, f"killed after {first} updates"
        assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-3", "checkpoint-4", "final.safetensors"]
    assert len(seen) > 1, "every kill came at the same stage"


def test_two_processes_learn_what_one_learns_learns_alone(model, tmp_path: Path) -> None:
    """Sums in another order differ by 1e-7; Adam divides by √v, so that entries hardly in use may show 1e-5 of it."""
    config = replace(SMALL, samples_per_update=4, max_train_samples=8)

    def learned(name: str, config: SingleImageConfig) -> list:
        drawn, original = [], LatentDataset._drawn
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LatentDataset, "_drawn", lambda s, *key: drawn.append(key) or original(s, *key))
            with single_image_run(model, small_pixels(), CAPTION, config) as run:
                losses = [float(report.losses["loss"]) for report in run.steps()]
                written(run, tmp_path / name)
        return [drawn, losses, run.shard.samples]

    ranks = run_processes(lambda rank: learned(f"rank{rank}", config), 2)
    (drawn, losses, samples), _ = in_child(lambda: learned("one", config))
    first, second = ({tuple(key) for key in rank[0]} for rank in ranks)
    assert first and second and not first & second and first | second == {tuple(key) for key in drawn}
    assert ranks[0][1] == ranks[1][1] == pytest.approx(losses, rel=1e-5) and samples == ranks[0][2] == 4
    one, two, other = (read_tensors(tmp_path / name).tensors for name in ("one", "rank0", "rank1"))
    assert all(torch.equal(two[key], other[key]) for key in two)
    assert max(float((one[key] - two[key]).abs().max()) for key in one) <= 1e-5
