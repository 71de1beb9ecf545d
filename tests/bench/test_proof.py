"""The page of claims: only figures of today's weights, verdicts by interval, commands that exist."""

from __future__ import annotations

import importlib
import json
import math
import shlex
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import pytest
import tyro

from tests.bench import proof
from tests.bench.benches import BENCHES
from tests.bench.claim import Claim
from tests.bench.claims import CLAIMS
from tests.bench.lookups import above_fixed, calibration, edits, figure, on_frontier, quickstart, squares
from tests.bench.reasons import REASONS

WEIGHTS = {"embedded": ["a", "b"], "leaky": ["c", "b"]}


def run_folder(folder: Path, rows: list[dict[str, Any]], figures: Any = None, weights: Any = WEIGHTS["leaky"]) -> Path:
    folder.mkdir(exist_ok=True)
    lines = [{"stamp": {"weights": weights}}, *rows]
    (folder / "cells.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "figures.json").write_text(json.dumps(figures))
    return folder


@pytest.mark.parametrize(
    ("better", "by", "low", "value", "high", "verdict"),
    [
        ("above", "interval", 1.1, 2, 3, "yes"),
        ("above", "interval", 0.9, 2, 3, "by the value alone"),
        ("above", "interval", -1, 0.5, 3, "no"),
        ("above", "value", 0.9, 2, 3, "yes"),
        ("above", "value", 0.9, 1, 3, "yes"),
        ("below", "interval", -1, 0, 0.9, "yes"),
        ("below", "interval", -1, 0, 1.1, "by the value alone"),
        ("below", "value", 1, 1.1, 2, "no"),
        ("above", "interval", 0.5, 1, 2, "no"),
        ("above", "interval", None, 2, None, "by the value alone"),
    ],
)
def test_a_claim_is_borne_out_by_its_interval_or_where_it_says_so_by_its_value(better, by, low, value, high, verdict):
    claim = Claim("it rises", "leaky", figure("x"), goal=1, better=better, by=by)
    assert claim.verdict(value, low, high) == verdict


def test_every_claim_has_a_bench_and_every_bench_a_command_that_parses(tmp_path):
    assert {claim.bench for claim in CLAIMS} <= set(BENCHES)
    assert len({claim.text for claim in CLAIMS}) == len(CLAIMS)
    for bench in BENCHES.values():
        words = proof.command_of(bench, tmp_path, tmp_path)[3:]
        name = "tests.bench.drag.bench" if bench.module == "tests.bench.drag" else bench.module
        module = importlib.import_module(name)
        classes = [one for one in vars(module).values() if is_dataclass(one) and getattr(one, "__module__", "") == name]
        options = next(one for one in classes if "output_dir" in getattr(one, "__dataclass_fields__", {}))
        found = tyro.cli(options, args=words, config=(tyro.conf.OmitArgPrefixes,))
        assert found.output_dir == tmp_path, shlex.join(words)


def test_figures_of_other_weights_or_of_another_command_are_not_on_the_page(tmp_path):
    claim = next(claim for claim in CLAIMS if claim.bench == "leaky")
    record = {"benches": {"leaky": {"weights": WEIGHTS["leaky"], "command": BENCHES["leaky"].command()}}, "figures": {}}
    record["figures"] = {one.text: [0.5, 0.4, 0.6, 24] for one in CLAIMS if one.bench == "leaky"}
    assert f"| {claim.text} | 0.500 | [0.400, 0.600] | 24 | > 0.3 | leaky | yes |" in proof.page(record, WEIGHTS)
    assert "calibration" in proof.page(record, WEIGHTS).partition(proof.MISSING)[2]
    without = record | {"figures": {text: row for text, row in record["figures"].items() if text != claim.text}}
    assert "leaky" in proof.out_of_date(without, WEIGHTS)
    for stale in ({"weights": ["d", "b"]}, {"command": "another"}):
        other = record | {"benches": {"leaky": record["benches"]["leaky"] | stale}}
        assert claim.text not in proof.page(other, WEIGHTS) and "leaky" in proof.out_of_date(other, WEIGHTS)


def test_a_run_is_taken_in_with_its_table_if_it_is_of_these_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(proof, "RESULTS", tmp_path / "results")
    (tmp_path / "results").mkdir()
    values = {"value": 0.5, "low": 0.25, "high": 0.75, "n": 3}
    names = ("overlap", "iou", "wrong_object")
    folder = run_folder(tmp_path / "run", [], dict.fromkeys(names, values))
    (folder / "table.md").write_text("a table")
    record = proof.take({}, "leaky", folder, WEIGHTS)
    assert record["figures"]["The leaky twin: overlap of two noun maps"] == [0.5, 0.25, 0.75, 3]
    assert record["benches"]["leaky"]["weights"] == WEIGHTS["leaky"]
    assert (tmp_path / "results" / "tables" / "leaky.md").read_text() == "a table"
    with pytest.raises(ValueError, match="of the weights"):
        proof.take({}, "leaky", folder, WEIGHTS | {"leaky": ["e"]})


def test_lookups_pair_what_belongs_together(tmp_path):
    rows = [{"key": f"{arm}/{i}", "arm": arm, "task": str(i), "success": good, "psnr": db, "shape": "1x1"}
            for arm, good, db in (("--auto", True, 20.0), ("no forgetting", False, 22.0), ("decoder side", False, 19.0))
            for i in range(4)]  # fmt: skip
    folder = run_folder(tmp_path / "edits", rows)
    assert edits("--auto", "no forgetting", "success", 100)(folder) == (100, 100, 100, 4)
    assert edits("--auto", "no forgetting", "psnr")(folder)[0] == -2
    assert on_frontier("--auto")(folder)[0] == 100 and on_frontier("decoder side")(folder)[0] == 0
    # no forgetting for a third of the edits and decoder side for the others has 20 dB, and none that comes true
    assert above_fixed("--auto")(folder) == (100, 100, 100, 4)
    with pytest.raises(ValueError, match="no edits by another"):
        on_frontier("another")(folder)
    wide = [row | {"key": row["key"] + "/w", "shape": "2x1", "psnr": row["psnr"] - 1} for row in rows]
    tall = [row | {"key": row["key"] + "/t", "shape": "1x2", "psnr": row["psnr"] - 3} for row in rows]
    assert squares("psnr", arm="--auto")(run_folder(tmp_path / "wide", rows + wide + tall)) == (-2, -2, -2, 4)
    two = [{"key": f"{arm}/{i}", "overlap": value} for arm, value in (("calibrated", 0.25), ("weight 0", 0.5))
           for i in range(3)]  # fmt: skip
    assert calibration("overlap")(run_folder(tmp_path / "two", two)) == (-0.25, -0.25, -0.25, 3)
    scenes = run_folder(tmp_path / "five", [], [{"gain": gain} for gain in (9, 9, 7, 9, 9)])
    value, low, high, n = quickstart(lambda scene: scene["gain"] >= 8)(scenes)
    assert value == 80 and n == 5 and low is not None and high is not None and low < 80 < high


def test_ends_that_are_not_finite_are_left_out():
    assert proof._rounded([1 / 3, math.nan, math.inf, 1]) == [0.3333, None, None, 1]


def test_the_page_in_the_repository_is_of_the_weights_in_it(tmp_path):
    record = json.loads(proof.FIGURES.read_text(encoding="utf-8"))
    page = proof.PAGE.read_text(encoding="utf-8")
    assert page == proof.page(record, proof.fingerprints(tmp_path))
    assert "not found out" not in page, "each claim that is not borne out has its reason"
    assert all(any(claim.text.startswith(start) for claim in CLAIMS) for start in REASONS)
