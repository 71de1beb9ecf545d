"""`personalize drag`: one picture, its points, and what came of it in a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from personalize.drag import DragSettings
from personalize.dragging import DragResult, Point
from personalize.editor import Editor
from personalize.errors import UserError
from personalize.files import unowned_files, write_folder
from personalize.pictures import png

if TYPE_CHECKING:
    from personalize.commands import DragConfig

OURS = ("dragged.png", "mask.png", "overlay.png", "drag.json")


def run(config: DragConfig) -> Path:
    """Drag, write the pictures and drag.json, say where the points arrived and how long it took."""
    points = interleaved_points(config.from_, config.to)
    settings = DragSettings(
        mode=config.mode, steps=config.num_inference_steps, strength=config.strength,
        displacement=config.displacement, fill=config.fill, mask_threshold=config.mask_threshold, seed=config.seed,
    )  # fmt: skip
    editor = Editor.configured(config, (config.adapter,) if config.adapter else ())
    found = editor.drag(
        points, config.photo, mask=config.mask, prompt=config.prompt, settings=settings,
        resolution=config.resolution, paste=config.paste,
    )  # fmt: skip
    pictures = {"dragged.png": found.image, "mask.png": found.mask, "overlay.png": found.overlay}
    files = {name: png(picture) for name, picture in pictures.items()}
    files["drag.json"] = json.dumps(summary(points, found), indent=1).encode()
    write_folder(config.output_dir, files, keep=unowned_files(config.output_dir, OURS))
    for note in found.notes:
        print(f"Note: {note}.")
    for target, arrived, missed in zip(points[1::2], found.arrived, found.missed, strict=True):
        print(f"{written(target)}: arrived at {written(arrived)}, {missed:.1f} px from the target")
    print(f"{found.seconds:.1f} s; {', '.join(OURS)} in {config.output_dir}")
    return config.output_dir


def interleaved_points(handles: tuple[str, ...], targets: tuple[str, ...]) -> list[Point]:
    """Texts "x,y" of --from and --to as points, handle and target in turn.  UserError if their counts differ."""
    if len(handles) != len(targets):
        raise UserError(f"{len(handles)} of --from and {len(targets)} of --to: each --from needs a --to")
    return [parsed(text) for pair in zip(handles, targets, strict=True) for text in pair]


def parsed(text: str) -> Point:
    """ "120,64.5" → (120.0, 64.5)."""
    try:
        x, y = (float(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"a point is x,y in pixels, for example 120,64; got {text!r}") from None
    return x, y


def written(point: Point) -> str:
    return ",".join(f"{part:.4g}" for part in point)


def summary(points: list[Point], found: DragResult) -> dict[str, object]:
    """The contents of drag.json."""
    rows = zip(points[::2], points[1::2], found.arrived, found.missed, strict=True)
    drags = [{"from": h, "to": t, "arrived": a, "missed_px": round(m, 2)} for h, t, a, m in rows]
    thresholds = [round(value, 4) for value in found.drag.thresholds]
    times = {"seconds": round(found.seconds, 3), "edit_seconds": round(found.edit_seconds, 3)}
    return {"drags": drags, "mask_thresholds": thresholds, **times, "notes": found.notes}
