"""Two processes without a common disk: one checkpoint for both or none, and class pictures drawn by both."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object

from personalize.errors import UserError
from personalize.training import checkpoints, distributed
from personalize.training.data.class_images import BATCH, METADATA, from_base
from personalize.training.trainer import check_same_data
from tests.support.children import run_processes
from tests.support.tiny import tiny_sd1
from tests.training.test_checkpoints import checkpoint


def found(folder: Path, name: str) -> dict[str, object]:
    try:
        whole = checkpoints.find_together(folder, name, Accelerator(cpu=True))
    except UserError as error:
        return {"error": str(error)}
    return {"update": None if whole is None else whole.update}


def test_latest_is_what_the_main_process_has(tmp_path: Path) -> None:
    for process, updates in enumerate(((1, 2), (1, 2, 3))):
        for update in updates:
            checkpoints.save(tmp_path / f"machine-{process}", checkpoint(update))
    results = run_processes(lambda rank: found(tmp_path / f"machine-{rank}", "latest"), 2)
    assert results == [{"update": 2}, {"update": 2}]  # and not 3 on one of them


def test_a_machine_that_lacks_it_says_so_and_all_stop(tmp_path: Path) -> None:
    checkpoints.save(tmp_path / "machine-0", checkpoint(2))
    (tmp_path / "machine-1").mkdir()
    results = run_processes(lambda rank: found(tmp_path / f"machine-{rank}", "latest"), 2)
    for result in results:
        assert str(result["error"]).startswith("process 1: no checkpoint at checkpoint-2"), result
    results = run_processes(lambda rank: found(tmp_path / "nowhere", "latest"), 2)
    assert results == [{"update": None}, {"update": None}]


def test_what_the_main_process_refuses_is_said_as_by_one_process_alone(tmp_path: Path) -> None:
    """It advised to copy a checkpoint that was of other settings, or that did not exist."""
    checkpoints.save(tmp_path, checkpoint(2))

    def refused(rank: int) -> list[str]:
        said = []
        for name, metadata in (("checkpoint-3", None), ("latest", {"rank": 16})):
            try:
                checkpoints.find_together(tmp_path, name, Accelerator(cpu=True), metadata)
            except UserError as error:
                said.append(str(error))
        return said

    alone, (first, second) = run_processes(refused, 1)[0], run_processes(refused, 2)
    assert first == second == alone and len(alone) == 2


def test_who_never_starts_is_waited_for_a_limited_time_and_who_is_slow_for_long(monkeypatch) -> None:
    """On two machines, one of which had refused its options, the other waited for it for 30 days."""
    monkeypatch.setattr(distributed, "JOINING", timedelta(seconds=2))

    def started(rank: int) -> list[str]:
        try:
            distributed.accelerator_of(None, cpu=True)
        except UserError as error:
            return [str(error)]
        if rank:
            time.sleep(4)  # twice as long as all may take to start
        return gather_object([f"{rank}"])

    (said,), _ = run_processes(lambda rank: started(rank) if rank == 0 else [], 2)
    assert said.startswith("the processes of this launch did not come together within 0.0333333 minutes (")
    assert run_processes(started, 2) == [["0", "1"]] * 2


DATA = {"size": [64, 64], "caption": "a cat", "data_sha256": "ab", "base": {"name": "sd15", "sha256": "cd"}}


def told(about: Mapping[str, Any]) -> list[str]:
    try:
        check_same_data(about, Accelerator(cpu=True))
    except UserError as error:
        return [str(error)]
    return []


def test_machines_with_other_pictures_are_refused_on_all(tmp_path: Path) -> None:
    """They trained one adapter on both."""
    other = {"data_sha256": "ef"}, {"captions": ["a", "b"]}, {"base": {"name": "sd15", "sha256": "gh"}}
    said = "other pictures, masks or captions", "other captions", "another base model"
    for difference, words in zip(other, said, strict=True):
        first, second, third = run_processes(lambda rank, new=difference: told(DATA | (new if rank == 1 else {})), 3)
        assert first == second == third
        assert first[0].startswith(f"process 1 has {words} than process 0")
    moved = {"base": {"name": "a copy", "sha256": "cd"}}
    assert run_processes(lambda rank: told(DATA | (moved if rank else {})), 2) == [[], []]


def test_class_pictures_are_drawn_by_all_and_are_those_of_one(tmp_path: Path) -> None:
    count = BATCH + 2

    def draw(rank: int) -> list[list[int]]:
        os.environ["LOCAL_RANK"] = "0"  # each the only process of its machine
        model, asked = tiny_sd1(), []
        predict = model.predict
        model.predict = lambda latents, *rest: (asked.append(len(latents)), predict(latents, *rest))[1]  # pyright: ignore
        images = from_base(
            model, "a cat", count, size=(64, 64), steps=1, cache=tmp_path / f"machine-{rank}",
            accelerator=Accelerator(cpu=True),
        )  # fmt: skip
        assert len(images) == count
        return [asked]

    asked = run_processes(draw, 2)
    assert asked == [[[2 * BATCH]], [[2 * BATCH]]]  # a batch each; with guidance each picture is predicted twice
    alone = from_base(tiny_sd1(), "a cat", count, size=(64, 64), steps=1, cache=tmp_path / "alone")
    (first,) = (tmp_path / "machine-0").glob(f"*/{METADATA}")
    for image in alone:
        assert image.picture is not None
        name = Path(str(image.picture)).name
        assert (first.parent / name).read_bytes() == Path(str(image.picture)).read_bytes(), name
    assert np.unique([len(list(folder.glob("*"))) for folder in tmp_path.glob("*/*")]).tolist() == [2 * BATCH + 1]
