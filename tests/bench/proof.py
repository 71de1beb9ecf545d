"""Run the benches whose results are not of today's weights, and write one page of claims.

    python -m tests.bench.proof                       # which benches are out of date, and their commands
    python -m tests.bench.proof --run                 # run them one after the other; goes on where it was interrupted
    python -m tests.bench.proof --run "dynamic prompts" leaky
    python -m tests.bench.proof --take drags=runs/bench/drag     # take in the results of a run made by hand

A run belongs to the weights that the first line of its cells.jsonl names; that a folder given to --take is of the
bench's command is taken on trust.  results/figures.json keeps the figures of each
claim with the weights and the command of its bench, results/README.md shows those of today's weights, and
results/tables/ the benches' own tables.
"""

from __future__ import annotations

import json
import math
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from personalize.models.stable_diffusion import EMBEDDED, StableDiffusion
from tests.bench.benches import BENCHES, Bench
from tests.bench.cells import read_cells
from tests.bench.claim import Claim
from tests.bench.claims import CLAIMS
from tests.bench.leaky.train import UNET, assemble
from tests.bench.reasons import reason
from tests.bench.world import weights_of

RESULTS = Path(__file__).parent / "results"
FIGURES, PAGE = RESULTS / "figures.json", RESULTS / "README.md"
TABLES = ("table.md", "figures.md")  # of the folder of a run
HEAD = """# What is claimed, and what was measured

Written by `python -m tests.bench.proof` from [figures.json](figures.json); every figure is of the weights that ship:
of the [embedded model](../../../personalize/embedded/model/README.md) (fingerprint of the UNet `{embedded}`) or of
its [leaky twin](../leaky/README.md) (`{leaky}`), whose nouns look beside their objects. Intervals are of 95 %, n
counts what the claim is about: scenes, edits or pictures. "yes": the whole interval is on the right side of the goal,
or, where "value" is said, as of figures to be reached and of losses to be tolerated, the value is; "by the value
alone": the value is, the interval is not.

Identity is the PSNR of an edit against the true result where both should agree; w is the guidance scale; an arm is
one way of doing the same edits; the frontier are the arms to which no other one is better in identity and in edits
that come true. Loss weights are settings of [dynamic prompts](../README.md#noun-maps-and-uniform-maps). Tables:
[tables](tables).

| claim | figure | interval | n | goal | bench | borne out |
|---|---|---|---|---|---|---|
"""
WHY = "\n## Not borne out, or by the value alone, and why\n\n"
MISSING = "\nNot measured on these weights with today's command; nothing is claimed: "


@dataclass(frozen=True)
class Options:
    run: tuple[str, ...] | None = None
    """Benches to run; all that are out of date if none is named."""
    take: tuple[str, ...] = ()
    """Folders of finished runs, as NAME=FOLDER."""
    folder: Path = Path("runs/proof")
    """Where runs keep their cells and pictures, in a folder for each bench and weights."""


def fingerprints(folder: Path) -> dict[str, list[str]]:
    """The fingerprints of each network of both base models; `folder` gets the leaky twin as a pipeline."""
    models = {"embedded": EMBEDDED, "leaky": assemble(UNET, folder / "leaky-pipeline")}
    return {name: weights_of(StableDiffusion.load(path)) for name, path in models.items()}


def out_of_date(record: dict[str, Any], weights: dict[str, list[str]]) -> list[str]:
    """The names of the benches of which `record` lacks a claim's figure of these `weights` and of today's command."""
    known, figures = record.get("benches", {}), record.get("figures", {})
    lacking = {claim.bench for claim in CLAIMS if claim.text not in figures}
    wanted = {name: {"weights": weights[bench.base], "command": bench.command()} for name, bench in BENCHES.items()}
    return [name for name, row in wanted.items() if known.get(name) != row or name in lacking]


def command_of(bench: Bench, folder: Path, leaky: Path) -> list[str]:
    """The words of the command line that runs `bench` into `folder`."""
    model = ["--unet", str(UNET)] if bench.module.endswith("leaky.measure") else ["--model", str(leaky)]
    own = model if bench.base == "leaky" else []
    return [sys.executable, "-m", bench.module, *shlex.split(bench.options), *own, "--output_dir", str(folder)]


def take(record: dict[str, Any], name: str, folder: Path, weights: dict[str, list[str]]) -> dict[str, Any]:
    """`record` with the figures of the finished run in `folder`, whose table goes into results/tables.

    Raises:
        ValueError: the run is of other weights, or has not all figures.
    """
    bench = BENCHES[name]
    stamp, _ = read_cells(folder / "cells.jsonl")
    if stamp["weights"] != weights[bench.base]:
        raise ValueError(f"{folder} is of the weights {stamp['weights']}, not of {weights[bench.base]}")
    figures = {claim.text: _rounded(claim.lookup(folder)) for claim in CLAIMS if claim.bench == name}
    if wrong := [text for text, (value, *_) in figures.items() if value is None]:
        raise ValueError(f"{folder} has no figure of {wrong[0]!r}: is the run finished?")
    table = next((folder / one for one in TABLES if (folder / one).is_file()), None)
    if table is not None:
        (RESULTS / "tables").mkdir(exist_ok=True)
        shutil.copy(table, RESULTS / "tables" / f"{file_name(name)}.md")
    benches = record.get("benches", {}) | {name: {"weights": weights[bench.base], "command": bench.command()}}
    figures = record.get("figures", {}) | figures
    return {"benches": benches, "figures": {one.text: figures[one.text] for one in CLAIMS if one.text in figures}}


def file_name(name: str) -> str:
    """The name of a bench as part of a file's."""
    return name.replace(", ", "-").replace(" ", "-")


def _rounded(figure: Sequence[float | None]) -> list[float | None]:
    """Rounded to four decimals; numbers that are not finite become None."""
    return [None if value is None or not math.isfinite(value) else round(value, 4) for value in figure]


def page(record: dict[str, Any], weights: dict[str, list[str]]) -> str:
    """The page of claims, in Markdown, of those benches of `record` that are of these `weights`."""
    stale = out_of_date(record, weights)
    text = HEAD.format(**{name: every[0] for name, every in weights.items()})
    text += "".join(_line(claim, record["figures"][claim.text]) for claim in CLAIMS if claim.bench not in stale)
    text += WHY + _reasons(record, [claim for claim in CLAIMS if claim.bench not in stale])
    text += MISSING + "; ".join(stale) + " (`python -m tests.bench.proof --run`).\n" if stale else ""
    rows = [(name, row) for name, row in record.get("benches", {}).items() if name not in stale]
    return text + "\n" + "".join(f"* {name}: `{row['command']}`\n" for name, row in rows)


def _reasons(record: dict[str, Any], claims: Sequence[Claim]) -> str:
    """A line for each reason, with the `claims` that are not borne out for it."""
    lines: dict[str, list[str]] = {}
    for claim in claims:
        if claim.verdict(*record["figures"][claim.text][:3]) not in ("yes", "–"):
            lines.setdefault(reason(claim.text), []).append(claim.text)
    return "".join(f"* {'; '.join(texts)}. **Why**: {why}.\n" for why, texts in lines.items())


def _line(claim: Claim, figure: Sequence[float | None]) -> str:
    """One row of the page."""
    value, low, high, n = figure
    assert value is not None
    digits = {"": 3, "dB": 2}.get(claim.unit, 1)
    unit = f" {claim.unit}" if claim.unit else ""
    interval = "–" if low is None or high is None else f"[{low:.{digits}f}, {high:.{digits}f}]"
    sign = {"above": ">≥", "below": "<≤"}[claim.better][claim.by == "value"]
    goal = "–" if claim.goal is None else f"{sign} {claim.goal:g}{', value' if claim.by == 'value' else ''}"
    verdict = claim.verdict(value, low, high)
    cells = [claim.text, f"{value:.{digits}f}{unit}", interval, f"{n:.0f}", goal, claim.bench]
    return f"| {' | '.join(cells)} | {verdict if verdict in ('yes', '–') else f'**{verdict}**'} |\n"


def main(options: Options) -> None:
    """Run or take in what is asked for; write figures.json and the page after each bench."""
    options.folder.mkdir(parents=True, exist_ok=True)
    weights = fingerprints(options.folder)
    record = json.loads(FIGURES.read_text(encoding="utf-8")) if FIGURES.is_file() else {}
    for name, _, given in (one.partition("=") for one in options.take):
        record = _write(take(record, name, Path(given), weights), weights)
    for name in [] if options.run is None else options.run or out_of_date(record, weights):
        folder = options.folder / f"{file_name(name)}-{weights[BENCHES[name].base][0][:8]}"
        words = command_of(BENCHES[name], folder, options.folder / "leaky-pipeline")
        print(shlex.join(words), flush=True)
        subprocess.run(words, check=True)
        record = _write(take(record, name, folder, weights), weights)
    for name in out_of_date(record, weights):
        print(f"out of date: {name}: {BENCHES[name].command()}")
    _write(record, weights)


def _write(record: dict[str, Any], weights: dict[str, list[str]]) -> dict[str, Any]:
    FIGURES.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    PAGE.write_text(page(record, weights), encoding="utf-8")
    return record


if __name__ == "__main__":
    main(tyro.cli(Options, config=(tyro.conf.OmitArgPrefixes,)))
