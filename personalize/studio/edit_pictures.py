"""What the tab Edit shows: pictures with their settings, base and adapter side by side, the grid of two dials."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

from PIL import Image

from personalize.adapters.forgetting import parse_rule_sum
from personalize.editing.config import EditStrengths, Sampling
from personalize.io.atomic import write_file
from personalize.io.image_files import image_size
from personalize.io.progress import listening, part
from personalize.io.provenance import GENERATED
from personalize.studio.actions import Workbench
from personalize.studio.jobs import Job, JobQueue
from personalize.studio.parts import facts, links

MIXES = {"Projection: alpha and beta": "projection", "Subtraction: gamma": "subtraction"}
SHOWN = 24  # pictures in the history
ORDER = ("alpha", "beta", "gamma", "rule", "forgotten", "strength", "seed")  # the command draws the first one slowest


def strengths_of(entry: Mapping[str, Any]) -> EditStrengths:
    return EditStrengths(**{name: entry[name] for name in ("alpha", "beta", "gamma", "forget", "strength")})


def drawn_pictures(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The pictures of a result, each with its strengths, seed and scores."""
    return [(str(result["folder"] / entry["file"]), _label(entry)) for entry in result["entries"]]


def _label(entry: Mapping[str, Any]) -> str:
    judged = f"  edit {entry['edit']:.2f}  identity {entry['identity']:.2f}" if "score" in entry else ""
    return f"{strengths_of(entry)}  seed {entry['seed']}{judged}"


def pictures_text(result: Mapping[str, Any]) -> str:
    """The prompt as it was worded, and the files."""
    rows: dict[str, Any] = {"Prompt": result["entries"][0]["prompt"]}
    if "score" in result["entries"][0]:
        rows["Best"] = _label(result["entries"][0])
    names = [entry["file"] for entry in result["entries"]][:8]
    return facts(rows | {"Files": links([result["folder"] / name for name in names])})


def draw_base(bench: Workbench, options: Any, result: Mapping[str, Any], job: Job) -> tuple[str, str]:
    """The base's picture of the same prompt and seed, beside the first picture: the two files."""
    from personalize.io.figures import png

    first, editor = result["entries"][0], bench.editor_of(options)
    drawn = result["folder"] / first["file"]
    width, height = image_size(drawn)
    with listening(job.part), part("The base alone"):
        picture = editor.base(
            first["prompt"], seeds=[first["seed"]], negative_prompt=options.negative_prompt,
            sampling=Sampling(options.num_inference_steps, options.scheduler, options.guidance_scale, (height, width)),
        )[0]  # fmt: skip
    return str(write_file(result["folder"] / "base.png", png(picture, GENERATED))), str(drawn)


def two_dials(dials: Mapping[str, list[str]], result: Mapping[str, Any], folder: Path) -> Path:
    """A sheet with the first dial across and the second down; of several seeds the first is shown."""
    from personalize.io.figures import grid, png

    names = list(dials)
    across, down = (names[0], names[1] if len(names) > 1 else None)
    lengths: dict[str, int] = {name: len(dials.get(name, "1")) for name in ORDER}
    if "seed" not in dials:
        lengths["seed"] = len(result["entries"]) // math.prod(lengths.values())
    cells: dict[tuple[int, int], Image.Image] = {}
    for places, entry in zip(product(*map(range, lengths.values())), result["entries"], strict=True):
        of: dict[str, int] = dict(zip(ORDER, places, strict=True))
        at = (0 if down is None else of[down], of[across])
        if at not in cells:
            cells[at] = Image.open(folder / entry["file"])
    rows = range(1 if down is None else len(dials[down]))
    pictures = [[cells[y, x] for x in range(len(dials[across]))] for y in rows]
    labels = [] if down is None else [f"{down} {value}" for value in dials[down]]
    columns = [f"{across} {value}" for value in dials[across]]
    sheet = grid(pictures, columns=columns, labels=labels, title=result["entries"][0]["prompt"])
    return write_file(folder / "two-dials.png", png(sheet, GENERATED))


def history(queue: JobQueue) -> list[tuple[str, str, dict[str, Any]]]:
    """The pictures drawn so far, the newest first: file, label, and the fields to restore."""
    found = []
    for job in queue.history("edit"):
        for entry in job.result["entries"]:
            fields = job.inputs | {"dial_across": "–", "dial_down": "–", "count": 1}
            rules = parse_rule_sum(entry["forget"])
            if len(rules) == 1:
                fields |= {"rule": rules[0].name, "forgotten": 1 - rules[0].degree}
            else:  # none, or a sum as --auto draws it, whose shares are in its text
                fields |= {"rule": entry["forget"], "forgotten": 1}
            fields |= {"seed": entry["seed"], "strength": entry["strength"]}
            projection, subtraction = MIXES
            if entry["gamma"] is None:
                fields |= {"mix": projection, "alpha": entry["alpha"], "beta": entry["beta"]}
            else:
                fields |= {"mix": subtraction, "gamma": entry["gamma"]}
            found.append((str(job.result["folder"] / entry["file"]), _label(entry), fields))
    return found[:SHOWN]


def seen_pictures(queue: JobQueue) -> list[tuple[str, str]]:
    """File and label of the pictures of `history`, without those that were moved or removed."""
    return [(path, label) for path, label, _ in history(queue) if Path(path).is_file()]


def fields_of(queue: JobQueue, path: str) -> dict[str, Any]:
    """The fields that drew the picture at `path`; none if the history has it no more."""
    return next((fields for drawn, _, fields in history(queue) if drawn == path), {})
