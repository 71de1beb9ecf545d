"""What was trained is saved whatever fails, and a signal to stop waits for the update or the save at hand."""

from __future__ import annotations

import os
import signal
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from personalize.errors import Notice, Stopped, UserError
from personalize.io.locks import Locked
from personalize.training import saving, trainer
from personalize.training.loop import StepReport
from personalize.training.saving import check_space_for, save_trained
from personalize.training.stopping import stop_requests

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


class Saved:
    """An adapter that can be saved everywhere but in `bad`."""

    def __init__(self, *bad: Path, signal: int | None = None) -> None:
        self.bad, self.signal, self.saved = bad, signal, []

    def save(self, folder: Path, **options: Any) -> Path:
        if self.signal is not None:
            os.kill(os.getpid(), self.signal)
        if any(Path(folder).is_relative_to(place) for place in self.bad):
            raise UserError(f"could not write {folder}: No space left on device")
        self.saved.append(Path(folder))
        return Path(folder)


def test_an_adapter_that_cannot_be_saved_goes_into_a_rescue_folder(tmp_path, monkeypatch) -> None:
    (tmp_path / "here" / "cat-rescued").mkdir(parents=True)
    (tmp_path / "temporary").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    adapter: Any = Saved(tmp_path / "full")
    with pytest.raises(UserError, match="No space left .*the adapter is saved in .*here/cat-rescued-2 instead"):
        save_trained(adapter, tmp_path / "full" / "cat")
    assert adapter.saved == [tmp_path / "here" / "cat-rescued-2"]
    adapter = Saved(tmp_path / "full", tmp_path / "here")
    with pytest.raises(UserError, match="the adapter is saved in .*temporary.*cat-rescued instead"):
        save_trained(adapter, tmp_path / "full" / "cat")
    adapter = Saved(tmp_path)
    with pytest.raises(UserError, match="could not write .*full/cat: No space left on device$"):
        save_trained(adapter, tmp_path / "full" / "cat")


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_waits_until_the_adapter_is_saved(tmp_path, number) -> None:
    adapter, before = Saved(signal=number), signal.getsignal(number)
    with pytest.raises(Stopped, match="the adapter is saved in") as stopped:
        save_trained(adapter, tmp_path)  # pyright: ignore[reportArgumentType]
    assert adapter.saved == [tmp_path] and stopped.value.exit_code == 128 + number
    assert signal.getsignal(number) == before


def test_the_second_signal_does_not_wait() -> None:
    with pytest.raises(Stopped), stop_requests() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == signal.SIGTERM
        os.kill(os.getpid(), signal.SIGTERM)


def test_ignored_signals_stay_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_requests() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
        assert stop.signal is None
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("every", "limit", "largest", "whole"),
    [(None, None, 4_000, 16_000), (10, None, 8_000, 96_000), (10, 2, 8_000, 76_000), (10, 9, 8_000, 96_000)],
)
def test_the_space_of_the_adapter_and_its_checkpoints(monkeypatch, every, limit, largest, whole) -> None:
    """Of 1,000 numbers: 4 kB; the adapter in two layouts twice, and five times as much for each checkpoint."""
    asked = []
    monkeypatch.setattr(saving, "check_space", lambda *space: asked.append(space))
    objective = SimpleNamespace(resumable=lambda: {"a": torch.zeros(1000)})
    config = SimpleNamespace(output_dir="x", checkpointing_steps=every, checkpoints_total_limit=limit)
    run = SimpleNamespace(objective=objective, updates=40, update=0, average=None, best=None)
    check_space_for(config, run)
    assert asked == [("x", largest + saving.MARGIN, whole + 2 * saving.MARGIN)]
    if every:
        run.average = run.best = object()  # two copies more in each of the checkpoints
        check_space_for(config, run)
        assert asked[1][2] - asked[0][2] == 4_000 * 2 * (4 if limit is None else min(4, limit + 1))


class Run(SimpleNamespace):
    """A run of four updates, which sends a signal in one of them, and records its checkpoints."""

    def metadata(self):
        return {}

    def steps(self):
        for self.update in range(1, 5):
            if self.update == self.signal_at:
                os.kill(os.getpid(), self.signal)
            yield StepReport(self.update, {"loss": torch.tensor(0.0)}, (0.0,))

    def save_checkpoint(self, folder, limit=None, *, wait=True):
        if self.update in self.failing:
            raise UserError("could not write: No space left")
        self.saved.append((self.update, wait))
        return Path(f"checkpoint-{self.update}")


@pytest.fixture
def run(monkeypatch) -> Any:
    for name in ("check_same_data", "_resume", "check_space_for", "estimate", "check_fits"):
        monkeypatch.setattr(trainer, name, lambda *_: None)
    accelerator = SimpleNamespace(
        is_main_process=True, is_local_main_process=False, num_processes=1, log=lambda *_, **__: None,
        print=lambda *_: None,
    )  # fmt: skip
    return Run(accelerator=accelerator, updates=4, update=0, best=None, saved=[], failing=(), signal_at=None, shard="")


def options(steps: int | None) -> SimpleNamespace:
    return SimpleNamespace(
        report_to=None, checkpointing_steps=steps, checkpoints_total_limit=None, validation_prompt=None, output_dir="x"
    )


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_saves_a_checkpoint_after_the_update(run, number) -> None:
    run.signal, run.signal_at = number, 3
    with pytest.raises(Stopped, match="stopped after 3 of 4 updates: checkpoint-3 is saved, go on with"):
        trainer.train(options(2), run, "x")
    assert run.saved == [(2, True), (3, False)]


@pytest.mark.parametrize("update", [2, 4])
def test_a_signal_while_pictures_are_drawn_is_obeyed_also_after_the_last_update(run, monkeypatch, update) -> None:
    """After the last one it was forgotten: the adapter was saved, previewed and uploaded as if nobody had asked."""

    def drawn(run: Any, *_: Any) -> None:
        if run.update == update:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(trainer, "validate", drawn)
    settings = options(100)
    settings.validation_prompt, settings.validation_steps = "a cat", 1
    ended = min(update + 1, 4)
    with pytest.raises(Stopped, match=f"stopped after {ended} of 4 updates: checkpoint-{ended} is saved, go on with"):
        trainer.train(settings, run, "x")
    assert run.saved == [(ended, False)]


def test_without_checkpoints_an_interrupt_ends_at_once(run) -> None:
    run.signal, run.signal_at = signal.SIGINT, 3
    with pytest.raises(
        KeyboardInterrupt, match="stopped after .* of 4 updates: nothing is kept; with --checkpointing_"
    ):
        trainer.train(options(None), run, "x")
    assert run.saved == []


def test_a_checkpoint_that_the_disk_does_not_take_does_not_end_the_training(run) -> None:
    run.failing = (2,)
    with pytest.warns(Notice, match="update 2 has no checkpoint, training goes on: could not write: No space left"):
        trainer.train(options(2), run, "x")
    assert run.saved == [(4, True)]


def test_when_another_process_ends_the_main_one_saves_what_there_is(run) -> None:
    run.accelerator.num_processes = 2

    def steps():
        run.update = 1
        yield StepReport(1, {"loss": torch.tensor(0.0)}, (0.0,))
        raise RuntimeError("[pair.cc:534] Connection closed by peer [127.0.0.1]:123")

    run.steps = steps
    with pytest.raises(UserError, match="another process .* has ended after 1 of 4 updates: checkpoint-1 is saved"):
        trainer.train(options(50), run, "x")
    assert run.saved == [(1, False)]


def test_a_second_training_into_a_folder_is_refused(tmp_path) -> None:
    with trainer.output_folder(tmp_path / "out"):
        with pytest.raises(Locked, match="is in use for training by process"), trainer.output_folder(tmp_path / "out"):
            pass
    assert not (tmp_path / "out").exists()
