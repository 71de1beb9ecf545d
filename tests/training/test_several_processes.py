"""Two processes without a common disk: one checkpoint for both or none, and class pictures drawn by both."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from accelerate import Accelerator

from personalize.errors import UserError
from personalize.training import checkpoints
from personalize.training.data.class_images import BATCH, METADATA, from_base
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
