"""The update as one static step: what a CUDA graph needs of it, checked where there is none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from personalize.errors import UserError
from personalize.randomness import generator
from personalize.training import cuda_graph
from personalize.training.config import SingleImageConfig
from personalize.training.cuda_graph import GraphedStep, check_capturable, replay_steps
from personalize.training.finite import NonFiniteError
from personalize.training.single_image import SingleImageRun, single_image_run
from tests.support.tiny import tiny_sd1

HOST = ("_local_scalar_dense", "nonzero", "equal.default", "masked_select", "is_nonzero", "item")
SMALL = SingleImageConfig(rank=2, max_train_samples=8, samples_per_update=2, targets="attention", max_grad_norm=0.5)


@contextmanager
def run_of(config: SingleImageConfig = SMALL) -> Iterator[SingleImageRun]:
    pixels = torch.randn(1, 3, 64, 64, generator=generator(0, "picture")).clamp(-1, 1)
    with single_image_run(tiny_sd1(), pixels, "a red cat", config) as run:
        yield run


def static(run: SingleImageRun) -> GraphedStep:
    batches = run.dataset.batches(run.shard, 0, run.updates)
    norm = run.config.max_grad_norm
    more = {"max_grad_norm": norm, "accumulation": run.shard.accumulation}
    return GraphedStep(run.objective, batches, run.optimizer.optimizer, run.model.device, **more)  # pyright: ignore


def learned(run: SingleImageRun) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in run.objective.trainable().items()}


class Recorder(TorchDispatchMode):
    """Operators with their sizes; raises where the host would have to wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        if any(word in name for word in HOST):
            raise AssertionError(f"{name} makes the host wait")
        sizes = tuple(tuple(arg.shape) for arg in args if isinstance(arg, Tensor))
        self.ran.append((name, sizes))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("accumulation", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_speed_static_step_equals_the_loop(accumulation: int) -> None:
    config = replace(SMALL, samples_per_update=2 * accumulation, train_batch_size=2)
    with run_of(config) as run:
        looped = [float(report.losses["loss"]) for report in run.steps()]
        plain = learned(run)
    with run_of(config) as run:
        stepped = [float(report.losses["loss"]) for report in replay_steps(static(run))]
        graphed = learned(run)
    assert stepped == looped and len(looped) == 4 // accumulation
    # bit-equal but for the clipping factor, which the loop's own function computes in another order
    assert all(torch.allclose(graphed[name], plain[name], rtol=0, atol=1e-7) for name in plain)


def test_speed_static_step_has_one_shape_one_place_and_no_word_to_the_host() -> None:
    with run_of() as run:
        step = static(run)
        step()  # AdamW makes its state
        places, records = [], []
        for _ in range(3):
            with Recorder() as recorder:
                step()
            records.append(recorder.ran)
            state = [t for s in step.optimizer.state.values() for t in s.values()]
            tensors = [*step.parameters, *state, *step.samples.values(), step.count, step.losses, step.stopped]
            places.append([tensor.data_ptr() for tensor in tensors])
    assert records[0] == records[1] == records[2] and len(records[0]) > 1000
    assert places[0] == places[1] == places[2]


def test_speed_a_number_that_is_none_stops_before_the_weights() -> None:
    with run_of(replace(SMALL, max_train_samples=4)) as run:
        expected = [None for _ in run.steps()]
        good = learned(run)
    with run_of() as run:
        step = static(run)
        step.samples["noise"][2, 0, 0, 0, 0, 0] = torch.nan  # the third update's
        with pytest.raises(NonFiniteError, match="update 3: its loss or a gradient is not finite"):
            for _ in replay_steps(step):
                pass
        assert len(expected) == 2
        assert all(torch.allclose(tensor, good[name], rtol=0, atol=1e-7) for name, tensor in learned(run).items())


def test_speed_learning_goes_through_the_static_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graph, "check_capturable", lambda *_, **__: None)  # as if on CUDA
    with run_of(replace(SMALL, cuda_graph=True)) as run:
        assert [report.update for report in run.steps()] == [1, 2, 3, 4] and run.update == 4


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"gradient_checkpointing": True}, "saves random states"),
        ({"torch_compile": True}, "not been tried on a GPU"),
        ({"use_8bit_adam": True}, "counts its steps on the host"),
        ({"early_stop_loss": 0.03}, "decides on the host"),
        ({"samples_per_update": 8, "max_train_samples": 7, "train_batch_size": 4}, "_batch_size that divides 7"),
    ],
)
def test_speed_what_no_graph_can_hold_is_said(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        check_capturable(replace(SMALL, **change), torch.device("cuda"), 1, autocast=False)
    with pytest.raises(UserError, match="cuda_graph needs a CUDA device, this is cpu"):
        check_capturable(SMALL, torch.device("cpu"), 1, autocast=False)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_speed_graph_equals_the_loop_on_cuda() -> None:
    model = tiny_sd1()
    for part in (model.unet, model.vae, *model.text_encoders):
        part.to("cuda")
    model.alphas_cumprod = model.alphas_cumprod.cuda()
    pixels = torch.randn(1, 3, 64, 64, generator=generator(0, "picture")).clamp(-1, 1)
    results = []
    for graphed in (False, True):
        config = replace(SMALL, max_train_samples=20, max_grad_norm=None, cuda_graph=graphed)
        with single_image_run(model, pixels, "a red cat", config) as run:
            losses = [float(report.losses["loss"]) for report in run.steps()]
            results.append((losses, learned(run)))
    assert len(results[0][0]) == 10 > cuda_graph.WARM
    # attention's backward pass adds in no fixed order there
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-3)


def test_a_finished_run_that_is_resumed_makes_no_update(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graph, "check_capturable", lambda *_, **__: None)
    with run_of(replace(SMALL, cuda_graph=True)) as run:
        run.update = run.updates
        before = learned(run)
        assert list(run.steps()) == []
        assert all(torch.equal(before[name], tensor) for name, tensor in learned(run).items())
