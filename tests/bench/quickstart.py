"""`personalize quickstart` on the five sample pictures: seconds, fidelity of the replay, and success of the edits.

    python -m tests.bench.quickstart                # on an idle machine; about two minutes a scene
    python -m tests.bench.quickstart --scenes 0 3
    python -m tests.bench.quickstart --shares 1 0.6 0.5 0.4 --share_seeds 1 2    # choose the second row's share, too

Goals: the PSNR of the replayed source is at least 8 dB above that of the base's own sample; in one
row of the sheet the judge finds at least 3 of the 4 edits right, with identity at least 4 dB above the base's samples
of the same prompts; learning takes at most 75 s and the whole command 150 s, on two idle cores.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from PIL import Image

from personalize.adapters.apply import load_adapters
from personalize.cli.commands.quickstart import CHOSEN, SAMPLING, VARIANTS
from personalize.editing.editor import Editor
from personalize.embedded.samples import bundled
from personalize.models.stable_diffusion import StableDiffusion
from tests.bench.cells import Cells
from tests.bench.contract import Task, score
from tests.bench.judge.judge import Judge
from tests.bench.picture_measures import psnr
from tests.bench.world import weights_of

REPLAY_GAIN, IDENTITY_GAIN, EDITS_RIGHT = 8.0, 4.0, 3  # dB, dB, of four


@dataclass(frozen=True)
class QuickstartBench:
    output_dir: Path = Path("runs/quickstart")
    """Where each scene's quickstart, cells.jsonl and table.md go; finished cells are not measured again."""
    scenes: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Numbers of the sample pictures to use."""
    seed: int = 0
    """Seed of the training and of the pictures."""
    shares: tuple[float, ...] = ()
    """Shares of what the decoder learned, with each of which the adapters' edits are sampled again and judged."""
    share_seeds: tuple[int, ...] = (1, 2)
    """Seeds of those pictures."""


def quickstart(options: QuickstartBench, scene: int) -> dict[str, Any]:
    """Run the command in a process of its own; returns the seconds that it reports, and those of the process."""
    folder = options.output_dir / f"scene-{scene}"
    shutil.rmtree(folder, ignore_errors=True)  # of an interrupted run: new pictures would get other names
    words = ["quickstart", "--scene", str(scene), "--seed", str(options.seed), "--output_dir", str(folder)]
    load, started = os.getloadavg()[0], time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "personalize", *words], capture_output=True, text=True, check=True)
    elapsed = time.perf_counter() - started
    times = re.search(r"Learned in (\d+) s; (\d+) s in all", done.stdout)
    assert times is not None, f"no times in {done.stdout!r}"
    return {"learned": int(times[1]), "command": int(times[2]), "process": round(elapsed, 1), "load": load}


def load_pictures(folder: Path, names: Iterable[str]) -> list[np.ndarray]:
    return [np.asarray(Image.open(folder / "pictures" / f"{name}.png")) for name in names]


def tasks_of(scene: int) -> list[Task]:
    example = bundled(scene)
    assert example.scene is not None
    after = [change.truth or example.scene for change in example.edits]
    return [Task(c.kind, c.prompt, example.scene, t) for c, t in zip(example.edits, after, strict=True)]


def plain_scores(tasks: list[Task], editor: Editor, seed: int, judge: Judge) -> list[dict[str, Any]]:
    """The scores of the base's own pictures of the tasks' prompts."""
    pictures = [np.asarray(editor.base(t.name, seeds=[seed], sampling=SAMPLING)[0]) for t in tasks]
    return [asdict(score(*pair, judge)) for pair in zip(tasks, pictures, strict=True)]


def compare_with_base(
    tasks: list[Task], pictures: list[np.ndarray], plain: list[dict[str, Any]], judge: Judge
) -> dict[str, list[Any]]:
    """Which pictures show their edit, and how much better they keep identity than the base's, in dB.

    plain: the base's scores.
    """
    scores = [asdict(score(*pair, judge)) for pair in zip(tasks, pictures, strict=True)]
    gains = [mine["psnr"] - theirs["psnr"] for mine, theirs in zip(scores, plain, strict=True)]
    return {"right": [one["success"] for one in scores], "gains": np.round(gains, 2).tolist()}


def redraw_with_shares(
    options: QuickstartBench, scene: int, seed: int, model: StableDiffusion, judge: Judge
) -> dict[str, dict[str, list[Any]]]:
    """For each share: the edits of the sheet's second row, from another seed, with that share of the decoder kept."""
    tasks, folder = tasks_of(scene), options.output_dir / f"scene-{scene}" / "adapter"
    second = list(VARIANTS.values())[1]
    rows = {}
    with Editor(model, load_adapters(folder)) as editor:
        plain = plain_scores(tasks, editor, seed, judge)
        for share in options.shares:
            setting = replace(second, forget="none" if share == 1 else f"decoder={share:g}")
            edits = [np.asarray(editor.edit(t.name, setting, seeds=[seed], sampling=SAMPLING)[0]) for t in tasks]
            rows[f"{share:g}"] = compare_with_base(tasks, edits, plain, judge)
    return rows


def measure_scene(options: QuickstartBench, scene: int, model: StableDiffusion, judge: Judge) -> dict[str, Any]:
    """PSNR of the replay and of the base's sample; for each row of the sheet, which edits are right, identity gains."""
    folder = options.output_dir / f"scene-{scene}"
    source, replay, own = load_pictures(folder, ("source", "replay", "base"))
    tasks = tasks_of(scene)
    plain = plain_scores(tasks, Editor(model), options.seed, judge)
    rows = {}
    for number, variant in enumerate((*VARIANTS, CHOSEN)):
        edits = load_pictures(folder, (f"edit-{number * len(tasks) + k:03d}" for k in range(len(tasks))))
        rows[variant] = compare_with_base(tasks, edits, plain, judge)
    replayed, alone = psnr(replay, source), psnr(own, source)
    return {"replay": replayed, "base": alone, "rows": rows, "base_right": [one["success"] for one in plain]}


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table with a line for each scene and row of its sheet; identity is the mean gain over four edits."""
    lines = [
        "| scene | replay dB | base dB | gain | row of the sheet | edits right | identity above the base, dB "
        "| learned s | command s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        head = f"| {row['scene']} | {row['replay']:.1f} | {row['base']:.1f} | {row['replay'] - row['base']:+.1f} "
        for variant, edits in row["rows"].items():
            right = f"{sum(edits['right'])} of {len(edits['right'])}"
            gains = f"{np.mean(edits['gains']):+.1f} ({', '.join(f'{gain:+.1f}' for gain in edits['gains'])})"
            lines.append(f"{head}| {variant} | {right} | {gains} | {row['learned']} | {row['command']} |")
    replays = sum(row["replay"] - row["base"] >= REPLAY_GAIN for row in rows)
    successes = sum(any(map(goals_reached, row["rows"].values())) for row in rows)
    lines.append(
        f"\nReplay {REPLAY_GAIN:g} dB above the base: {replays} of {len(rows)} scenes. At least {EDITS_RIGHT} edits "
        f"right in one row, identity {IDENTITY_GAIN:g} dB above the base: {successes} of {len(rows)}.\n"
    )
    return "\n".join(lines)


def share_table(options: QuickstartBench, results: list[dict[str, Any]]) -> str:
    """A Markdown table of the means over scenes and seeds, for each share."""
    lines = ["| share of the decoder kept | edits right, of 4 | identity above the base, dB |", "|---|---|---|"]
    for share in (f"{share:g}" for share in options.shares):
        right = np.mean([sum(rows[share]["right"]) for rows in results])
        gain = np.mean([np.mean(rows[share]["gains"]) for rows in results])
        lines.append(f"| {share} | {right:.1f} | {gain:+.1f} |")
    return "\n".join(lines) + "\n"


def goals_reached(row: dict[str, Any]) -> bool:
    """Whether a row of the sheet has enough right edits, and identity far enough above the base's."""
    return sum(row["right"]) >= EDITS_RIGHT and float(np.mean(row["gains"])) >= IDENTITY_GAIN


def run(options: QuickstartBench) -> str:
    """Measure the cells that are not finished, write table.md and figures.json, and return the table."""
    model, judge = StableDiffusion.load(), Judge.load()
    stamp = {"weights": weights_of(model), "seed": options.seed}
    cells, sheets = Cells(options.output_dir / "cells.jsonl", stamp), []
    for scene in options.scenes:
        times = cells.once(f"seconds/{scene}", lambda scene=scene: quickstart(options, scene))
        figures = cells.once(f"figures/{scene}", lambda scene=scene: measure_scene(options, scene, model, judge))
        sheets.append({"scene": scene, **figures, **times})
        print(f"scene {scene}: done", flush=True)
    text = table(sheets)
    if options.shares:
        named = ",".join(f"{share:g}" for share in options.shares)
        pairs = [(scene, seed) for seed in options.share_seeds for scene in options.scenes]
        results = [
            cells.once(
                f"shares/{named}/{s}/{seed}", lambda s=s, seed=seed: redraw_with_shares(options, s, seed, model, judge)
            )
            for s, seed in pairs
        ]
        text += "\n" + share_table(options, results)
    (options.output_dir / "table.md").write_text(text, encoding="utf-8")
    (options.output_dir / "figures.json").write_text(json.dumps(sheets, indent=1) + "\n", encoding="utf-8")
    return text


if __name__ == "__main__":
    torch.set_num_threads(os.cpu_count() or 1)
    print(run(tyro.cli(QuickstartBench, config=(tyro.conf.OmitArgPrefixes,))))
