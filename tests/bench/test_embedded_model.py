"""Every figure of the embedded model's bench, in miniature on a tiny random model."""

from __future__ import annotations

import json

import numpy as np
import pytest

from personalize.embedded.scenes import Scene, SceneObject
from tests.bench import attention_auc, embedded_model
from tests.bench.attention_auc import auc, coverage, point_inside, token_positions
from tests.bench.embedded_model import FIGURES, EmbeddedModelBench
from tests.bench.figure_tables import LINES, lost_without_a_caption, nouns_found
from tests.support.tiny import tiny_sd1


@pytest.fixture(scope="module")
def model():
    return tiny_sd1()


def _options(folder, **changes) -> EmbeddedModelBench:
    known = {"nouns": ("cat", "dog", "fox"), "styles": ("3d",)}
    return EmbeddedModelBench(**{"output_dir": folder, "n": 2, "batch": 2, "steps": 2, **known, **changes})


def test_every_figure_is_measured_and_written(tmp_path, model, monkeypatch):
    monkeypatch.setattr(embedded_model, "INVERSION_STEPS", 3)
    monkeypatch.setattr(embedded_model, "TIMED_RUNS", 1)
    monkeypatch.setattr(embedded_model, "SHEET_SIDE", 2)
    monkeypatch.setattr(attention_auc, "TIMESTEPS", (300, 500, 700))
    found = embedded_model.run(_options(tmp_path, n=1, steps=1), model)["figures"]
    assert set(LINES) - {"right_style_when_asked"} <= set(found)
    assert found["right_object"]["n"] == found["autoencoder_psnr"]["n"] == 1
    assert 0 <= found["noun_map_auc"]["value"] <= 1
    assert json.loads((tmp_path / "figures.json").read_text())["figures"] == found
    text = (tmp_path / "figures.md").read_text()
    assert all(words in text for words in ("right object, %", "against the true mask", "Wilson"))
    assert (tmp_path / "sheet.png").is_file()


def test_one_figure_alone_and_resumed_with_more(tmp_path, model, monkeypatch):
    embedded_model.run(_options(tmp_path, only=("nouns",), n=1), model)
    drawn = []
    pictures = embedded_model.Bench.pictures
    monkeypatch.setattr(
        embedded_model.Bench, "pictures", lambda self, texts, seeds: drawn.extend(seeds) or pictures(self, texts, seeds)
    )
    found = embedded_model.run(_options(tmp_path, only=("nouns", "background")), model)["figures"]
    assert drawn == [1] and found["right_background"]["n"] == 2 and "autoencoder_psnr" not in found


def test_other_settings_or_unknown_figures_are_refused(tmp_path, model):
    embedded_model.run(_options(tmp_path, only=("autoencoder",), n=1), model)
    with pytest.raises(ValueError, match="give another file"):
        embedded_model.run(_options(tmp_path, only=("autoencoder",), guidance_scale=2.0), model)
    with pytest.raises(ValueError, match=", ".join(FIGURES)):
        embedded_model.run(_options(tmp_path, only=("beauty",)), model)


def test_what_is_lost_without_a_caption_is_counted_scene_by_scene():
    rows = {"inversion/0": {"psnr": 30.0}, "inversion/1": {"psnr": 28.0}, "uncaptioned_inversion/1": {"psnr": 25.0}}
    rows["uncaptioned_inversion/7"] = {"psnr": 20.0}
    assert lost_without_a_caption(rows, 8) == [3.0], "only scenes of which both are known"
    assert lost_without_a_caption(rows, 1) == []


def test_nouns_that_are_rarely_there_come_first():
    rows = [{"asked": ["cat", "dog"], "seen": ["cat"]}, {"asked": ["cat", "fox"], "seen": ["cat", "dog"]}]
    found = nouns_found([*rows, {"asked": ["dog", "fox"], "seen": ["dog", "fox"]}])
    assert [(noun, figure["value"], figure["n"]) for noun, figure in found.items()] == [
        ("dog", 50, 2), ("fox", 50, 2), ("cat", 100, 2),
    ]  # fmt: skip


def test_auc_counts_ties_half():
    inside = np.array([True, True, False, False])
    assert auc(np.array([4, 3, 2, 1]), inside) == 1
    assert auc(np.array([1, 1, 1, 1]), inside) == 0.5
    assert auc(np.array([3, 1, 2, 1]), inside) == pytest.approx((2 + 0.5) / 4)  # pairs: 3>2, 3>1, 1<2, 1=1
    assert auc(np.array([3, 1, 2, 1]), np.ones(4, bool)) is None


def test_coverage_and_points_inside():
    mask = np.zeros((64, 64), bool)
    mask[:32, 40:] = True
    covered = coverage(mask, 2, 2)
    np.testing.assert_allclose(covered, [[0, 0.75], [0, 0]])
    for seed in range(20):
        x, y = point_inside(mask, seed)
        assert mask[int(y * 64), int(x * 64)]


def test_nouns_are_found_among_the_tokens(model):
    assert token_positions(model, "a cat and a dog on the beach", "dog") == [5]
    assert len(token_positions(model, "a coffee cup on the beach", "coffee_cup")) > 2  # not one of its words: bytes
    with pytest.raises(ValueError, match="no 'fox'"):
        token_positions(model, "a cat", "fox")


def test_a_perfect_map_has_auc_one(model, monkeypatch):
    """The hooks' rows are compared cell by cell with the mask of the right object."""
    scene = Scene("red", (SceneObject("cat", "3d", 0.3, 0.3, 0.5),))

    def perfect(self, p, site):
        mask = attention_auc.render(scene, model.resolution)[1][0]
        row = coverage(mask, site.height, site.width).ravel()
        self.rows[site.name] = attention_auc.torch.from_numpy(row)[None]
        self.sites[site.name] = site
        return p

    monkeypatch.setattr(attention_auc.NounMaps, "probs", perfect)
    found = attention_auc.attention_aucs(model, [scene], ["a cat on red"], [0])[0]["cross"]
    assert found and all(value == 1 for by_time in found.values() for value in by_time.values())
