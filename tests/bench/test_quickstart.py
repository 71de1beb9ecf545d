"""The bench of `personalize quickstart`: what it makes of pictures whose worth is known."""

import numpy as np
from PIL import Image

from personalize.cli.commands.quickstart import CHOSEN, VARIANTS
from personalize.editing.config import Sampling
from personalize.embedded.samples import bundled
from personalize.embedded.scenes import render
from tests.bench import quickstart
from tests.bench.judge.judge import Judge
from tests.support.lora_states import random_adapter
from tests.support.tiny import tiny


def test_true_results_are_right_and_the_unchanged_source_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(quickstart, "SAMPLING", Sampling(steps=1))
    example, folder = bundled(0), tmp_path / "scene-0" / "pictures"
    folder.mkdir(parents=True)
    assert example.scene is not None
    grey = np.full((128, 128, 3), 128, np.uint8)
    source = render(example.scene)[0]
    truths = [render(change.truth)[0] for change in example.edits if change.truth]
    named = {"source": source, "replay": source, "base": grey}
    named |= {f"edit-{k:03d}": picture for k, picture in enumerate([*truths, *[source] * 4, *truths])}
    for name, picture in named.items():
        Image.fromarray(picture).save(folder / f"{name}.png")
    options = quickstart.QuickstartBench(output_dir=tmp_path)
    found = quickstart.measure_scene(options, 0, tiny("sd1"), Judge.load())
    true, unchanged, chosen = (found["rows"][row] for row in (*VARIANTS, CHOSEN))
    assert all(true["right"]) and not any(unchanged["right"]), "doing nothing is no edit"
    assert chosen == true
    assert quickstart.goals_reached(true) and not quickstart.goals_reached(unchanged)
    assert found["replay"] == 60.0 and found["base"] < 20, "60 dB is what equal pictures count"
    text = quickstart.table([{"scene": 0, **found, "learned": 70, "command": 140}])
    assert "4 of 4" in text and "0 of 4" in text and "base: 1 of 1 scenes" in text


def test_shares_of_the_decoder_are_drawn_from_the_same_adapter_and_judged_separately(tmp_path, monkeypatch):
    monkeypatch.setattr(quickstart, "SAMPLING", Sampling(steps=1))
    model = tiny("sd1")
    random_adapter(model).save(tmp_path / "scene-0" / "adapter")
    options = quickstart.QuickstartBench(output_dir=tmp_path, shares=(1, 0.5))
    found = quickstart.redraw_with_shares(options, 0, 1, model, Judge.load())
    assert set(found) == {"1", "0.5"} and found["1"]["gains"] != found["0.5"]["gains"]
    assert all(len(row["right"]) == len(row["gains"]) == 4 for row in found.values())
    text = quickstart.share_table(options, [{"1": {"right": [True, False], "gains": [1.0, 2.0]}, "0.5": found["0.5"]}])
    assert "| 1 | 1.0 | +1.5 |" in text
