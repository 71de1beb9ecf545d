"""The bench of several concepts in miniature: a scene on random weights, resumed, with its table."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.bench import multi_concept
from tests.bench.judge import judge
from tests.bench.multi_concept import MultiConceptBench, map_iou, run
from tests.support.tiny import tiny

pytestmark = pytest.mark.skipif(not judge.WEIGHTS.is_file(), reason="the judge's weights are not here")


@pytest.mark.slow  # two learned adapters and all their edits
def test_a_scene_is_measured_resumed_and_tabled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = MultiConceptBench(
        model=tmp_path, output_dir=tmp_path / "out", scenes=1, budget=1, steps=2, updates=1, class_images=1,
        nouns=("cat", "dog"), timed_updates=1,
    )  # fmt: skip
    text = run(options, tiny("sd1"))
    assert "overlap of the class maps" in text and "× the speed without" in text and "n = 1 scenes" in text
    found = json.loads((tmp_path / "out" / "figures.json").read_text())
    assert len(found["scenes"]) == 1 and {"calibrated/0", "weight 0/0", "do nothing/0", "speed"} <= set(found["cells"])
    monkeypatch.setattr(multi_concept, "train_and_measure", lambda *_: pytest.fail("measured again"))
    assert run(options, tiny("sd1")) == text


def test_iou_of_a_map_with_its_mask() -> None:
    mask = np.zeros((64, 64), bool)
    mask[:, :32] = True
    attention = torch.zeros(16, 16)
    attention[:, :8] = 0.2
    assert map_iou(attention, mask) == 1
    assert map_iou(-attention, mask) == 0
