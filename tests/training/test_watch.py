"""A watcher sees every update, and may end a training that can then be gone on with."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from personalize.adapters.adapter import Adapter
from personalize.cli.launch import load_script, scripts
from personalize.cli.parser import parse
from tests.support.runs import same
from tests.support.tiny import tiny_folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("watch")
    Image.linear_gradient("L").resize((64, 64)).convert("RGB").save(folder / "cat.png")
    tiny_folder("sd1", folder)
    return folder


def learned(place: Path, name: str, *words: str, stop_after: int | None = None) -> tuple[Adapter, list[int]]:
    """The adapter that the trainer saves, and the updates that its watcher has seen."""
    script, seen = load_script(scripts("train")["single_image"]), []
    base = next(path.parent for path in place.rglob("model_index.json"))
    line = [
        str(place / "cat.png"), "--caption", "a photo of a cat", "--pretrained_model_name_or_path", str(base),
        "--output_dir", str(place / name), "--max_train_samples", "4", "--samples_per_update", "1", "--rank", "2",
        "--preview_steps", "0", *words,
    ]  # fmt: skip

    def watch(run, report) -> bool:
        seen.append(report.update)
        return report.update == stop_after

    script.main(parse(script.Config, line, prog="train"), watch)
    return Adapter.load(place / name), seen


def test_a_training_that_was_stopped_is_kept_and_goes_on_to_the_bit(place: Path) -> None:
    whole, seen = learned(place, "whole")
    assert seen == [1, 2, 3, 4]
    stopped, seen = learned(place, "stopped", stop_after=2)
    assert seen == [1, 2] and (place / "stopped" / "checkpoint-2").is_dir()
    assert not same(stopped, whole), "what it had learned by then"
    continued, seen = learned(place, "stopped", "--resume_from_checkpoint", "latest")
    assert seen == [3, 4] and same(continued, whole)
