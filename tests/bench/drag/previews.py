"""What drags in pixels do before anything is sampled, on many scenes: masks, arrival, remnants, turns.

    python -m tests.bench.drag.previews                       # 50 scenes of the embedded model's world
    python -m tests.bench.drag.previews --textured            # 50 before textured backgrounds

The measures are those of `bench`, taken from the warped picture, whose void holds its first contents.  A turn is a drag
of three points in the mode `region` by 30° with a scale of 1.4, against the scene rendered so.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from PIL import Image

from personalize.editing.drag.preview import preview_drag
from personalize.editing.drag.reading import DragSource
from personalize.embedded.scenes import render
from personalize.errors import UserError
from personalize.models.stable_diffusion import EMBEDDED
from tests.bench.drag.bench import Bench, DragBench
from tests.bench.drag.figures import DISTANCES, arrived, markdown
from tests.bench.drag.measures import away_from, background_only, find_shift, ghost, handle_point
from tests.bench.drag.turns import TURNS
from tests.bench.figure_tables import average, proportion
from tests.bench.picture_measures import iou, psnr

TURNED = TURNS[-1]  # by 30°, scaled by 1.4


@dataclass(frozen=True)
class PreviewBench:
    model: Path = EMBEDDED
    """A Stable Diffusion folder."""
    scenes: int = 50
    """Number of scenes."""
    textured: bool = False
    """Scenes before textured backgrounds."""
    output_dir: Path = Path("runs/bench/drag-previews")
    """Where results go; finished scenes found there are not measured again."""


def run(options: PreviewBench) -> dict[str, Any]:
    """Measure the scenes that are not finished, and write and return the figures."""
    bench = Bench(DragBench(options.model, options.scenes, textured=options.textured, output_dir=options.output_dir))
    rows = [bench.cells.once(f"previews/{seed}", lambda seed=seed: _row(bench, seed)) for seed in range(options.scenes)]
    table: dict[str, Any] = {}
    for cells in DISTANCES:
        moves = [row["moves"][str(cells)] for row in rows if "moves" in row]
        table[f"arrived, {cells} cells"] = proportion([arrived(move, bench.model.factor) for move in moves])
        for name in ("ghost", "recall", "iou", "background_db", "truth_db", "seconds"):
            table[f"{name}, {cells} cells"] = average([move[name] for move in moves], "")
    for name in ("turn_iou", "turn_db", "turn_nothing_db"):
        table[name] = average([row[name] for row in rows if name in row], "")
    table["handles refused"] = proportion(["refused" in row for row in rows])
    table["background handles refused"] = proportion([row["background_refused"] for row in rows])
    (options.output_dir / "figures.json").write_text(json.dumps(table, indent=1), encoding="utf-8")
    (options.output_dir / "figures.md").write_text(markdown(table), encoding="utf-8")
    return table


def _row(bench: Bench, seed: int) -> dict[str, Any]:
    """All measures of one scene; {"refused": …} for a handle that is taken for background."""
    ground, size = bench.ground(seed), bench.model.resolution
    moves: dict[str, Any] = {}
    row: dict[str, Any] = {"moves": moves}
    for cells in DISTANCES:
        task = bench.task(seed, cells)
        (before, masks), (truth, ends) = render(task.before, size, ground), render(task.after, size, ground)
        vector, handle = find_shift(truth, before, masks[0]), handle_point(masks[0])
        source = DragSource.of(bench.model, Image.fromarray(before), task.source_prompt)
        target = tuple(min(size - 1.0, max(0.0, at + by)) for at, by in zip(handle, vector, strict=True))
        try:
            preview = preview_drag(source, [handle, target], bench.settings)
        except UserError as error:
            return {"refused": str(error), "background_refused": _refuses(source, masks[0], bench)}
        picture, found = np.asarray(preview.warped), np.asarray(preview.mask) > 0
        left = masks[0] & away_from([ends[0]], 1, 1)
        moves[str(cells)] = {
            "vector": vector, "went": find_shift(picture, before, masks[0]), "seconds": preview.seconds,
            "ghost": ghost(picture, before, background_only(task.before, size, ground), left, masks[0]),
            "recall": float((found & masks[0]).sum() / masks[0].sum()), "iou": iou(found, masks[0]),
            "background_db": psnr(picture, truth, away_from([masks[0], ends[0]], bench.model.factor)),
            "truth_db": psnr(picture, truth),
        }  # fmt: skip
        row["background_refused"] = _refuses(source, masks[0], bench)
    return row | _turned(bench, seed)


def _turned(bench: Bench, seed: int) -> dict[str, Any]:
    """The measures of a turn by 30° with a scale of 1.4; {} where the object would leave the frame."""
    ground, size, scene = bench.ground(seed), bench.model.resolution, bench.task(seed, DISTANCES[0]).before
    first, last = TURNED.scenes(scene)
    (before, masks), (truth, ends) = render(first, size, ground), render(last, size, ground)
    source = DragSource.of(bench.model, Image.fromarray(before), bench.task(seed, DISTANCES[0]).source_prompt)
    points = TURNED.points(masks[0], ends[0])
    preview = preview_drag(source, points, replace(bench.settings, mode="region"))
    covered = preview.drag.covered.numpy()[:size, :size]
    return {
        "turn_iou": iou(covered, ends[0]), "turn_db": psnr(np.asarray(preview.warped), truth),
        "turn_nothing_db": psnr(before, truth),
    }  # fmt: skip


def _refuses(source: DragSource, mask: np.ndarray, bench: Bench) -> bool:
    """Whether a handle far from the object, the pixel with the largest distance to it, is refused."""
    ys, xs = np.nonzero(mask)
    rows, columns = np.mgrid[4 : len(mask) - 4, 4 : len(mask) - 4]
    far = np.argmax((rows - ys.mean()) ** 2 + (columns - xs.mean()) ** 2)
    point = (float(columns.flat[far]), float(rows.flat[far]))
    try:
        preview_drag(source, [point, (len(mask) / 2, len(mask) / 2)], bench.settings)
    except UserError:
        return True
    return False


if __name__ == "__main__":
    print(json.dumps(run(tyro.cli(PreviewBench, config=(tyro.conf.OmitArgPrefixes,))), indent=1))
