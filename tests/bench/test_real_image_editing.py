"""The bench of photo edits in miniature, and how it counts."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from tests.bench import real_image_editing as bench
from tests.bench.contract import BASE, DO_NOTHING
from tests.bench.judge import judge
from tests.bench.real_image_editing import REFERENCE, PhotoBench, counted_unet_rows, table
from tests.support.photos import shared
from tests.support.tiny import tiny

pytestmark = pytest.mark.skipif(not judge.WEIGHTS.is_file(), reason="the judge's weights are not here")
DIRECT = "P2P + direct"


def test_it_measures_resumes_and_writes(tmp_path, monkeypatch):
    world = {"nouns": ["cat", "dog", "fox"], "styles": ["flat", "3d"], "backgrounds": ["beach", "snow"]}
    (tmp_path / "world.json").write_text(json.dumps(world))
    options = PhotoBench(scenes=1, model=tmp_path, arms=(DIRECT, REFERENCE), steps=2, output_dir=tmp_path / "out")
    text = bench.run(options, tiny("sd1"))
    assert all(f"| object | {arm} | 1 |" in text for arm in (DO_NOTHING, BASE, DIRECT, REFERENCE))
    lines = [json.loads(line) for line in (tmp_path / "out" / "cells.jsonl").read_text().splitlines()[1:]]
    rows = {row["arm"]: row for row in lines}
    assert rows[DIRECT]["source_db"] > 45 > rows[REFERENCE]["source_db"]  # rounding to bytes, against drift
    assert (rows[DIRECT]["units"], rows[BASE]["units"], rows[DO_NOTHING]["units"]) == (2 + 2 * 4, 2 * 2, 0)
    assert (tmp_path / "out" / "sheet.png").is_file() and (tmp_path / "out" / "table.md").read_text() == text
    monkeypatch.setattr(bench.Bench, "row", None)
    assert bench.run(options, tiny("sd1")) == text
    with pytest.raises(SystemExit, match="unknown arms"):
        bench.run(PhotoBench(model=tmp_path, arms=("P2P",), steps=2, output_dir=tmp_path / "out"), tiny("sd1"))


def test_a_backward_pass_counts_as_two_predictions():
    model = shared()
    latents = torch.zeros(2, 4, 8, 8)
    prompts = model.prompts(["a cat", "a dog"])
    with counted_unet_rows(model) as units:
        with torch.no_grad():
            model.predict(latents, 500, prompts)
        model.predict(latents, 500, prompts)  # the text encoder's answer carries a gradient only if it is trained
        learned = replace(prompts, embeds=prompts.embeds.detach().requires_grad_(True))
        model.predict(latents, 500, learned).sum()
    assert units == [2, 2, 6]


def test_differences_are_paired():
    row = {"kind": "object", "success": True, "structure": 0.1, "source_db": 40.0, "units": 10, "seconds": 1.0}
    found = ((REFERENCE, "a", 10.0), (REFERENCE, "b", 30.0), (DIRECT, "b", 33.0), (DIRECT, "a", 13.0))
    rows = [row | {"arm": arm, "task": task, "psnr": psnr} for arm, task, psnr in found]
    line = next(line for line in table(rows).splitlines() if DIRECT in line)
    assert "+3.0 [+3.0, +3.0]" in line and "| 100.0 [" in line
