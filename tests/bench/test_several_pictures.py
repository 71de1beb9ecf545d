"""The bench of several pictures: what it learns from and what it asks for."""

from __future__ import annotations

from pathlib import Path

import pytest

from personalize.embedded.scenes import HELD_OUT_STYLE
from tests.bench.several_pictures import Bench, SeveralPicturesBench


def test_five_pictures_of_one_subject_in_three_shapes_and_edits_to_new_backgrounds(tmp_path: Path) -> None:
    bench = Bench(SeveralPicturesBench(output_dir=tmp_path))
    for index in range(2):
        scenes, tasks = bench.scenes(index), bench.tasks(index)
        subjects = {(thing.noun, thing.style) for scene in scenes for thing in scene.objects}
        assert len(subjects) == 1 and subjects.pop()[1] == HELD_OUT_STYLE
        seen = {scene.background for scene in scenes}
        assert len(seen) == 5 and len(tasks) == 4 and not seen & {task.after.background for task in tasks}
        sizes = {image.size for image, _ in bench.pictures(index)}
        assert sizes == {(128, 128), (160, 96), (96, 160)} and len({text for _, text in bench.pictures(index)}) == 5


@pytest.mark.slow
def test_adapters_are_kept_after_the_samples_that_were_asked_for(tmp_path: Path) -> None:
    """Also after a number that is not a whole number of updates: 10 samples are 2 updates of 4."""
    bench = Bench(SeveralPicturesBench(output_dir=tmp_path, samples=(4, 10)))
    bench.preset = {**bench.preset, "rank": 1, "targets": "attention"}
    bench.learn(0, 2)
    assert bench.folder(0, 2, 4).is_dir() and bench.folder(0, 2, 10).is_dir()
