"""`personalize drag`: drag points of one picture and write the pictures into a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from personalize.editing.drag.drag import DragSettings
from personalize.editing.drag.image import DragResult
from personalize.editing.editor import Editor
from personalize.errors import UserError
from personalize.io.atomic import unowned_files, write_folder
from personalize.io.figures import png
from personalize.models.image_processor import Point

if TYPE_CHECKING:
    from personalize.cli.edit_options import DragConfig

OUTPUT_FILES = ("dragged.png", "mask.png", "overlay.png", "drag.json")


def run(config: DragConfig) -> Path:
    """Drag, write the pictures and drag.json, and print where the points arrived and how long it took."""
    points, settings = interleaved_points(config.from_, config.to), drag_settings(config)
    editor = Editor.configured(config, (config.adapter,) if config.adapter else ())
    result = editor.drag(
        points, config.photo, mask=config.mask, prompt=config.prompt, settings=settings,
        resolution=config.resolution, paste=config.paste,
    )  # fmt: skip
    pictures = {"dragged.png": result.image, "mask.png": result.mask, "overlay.png": result.overlay}
    files = {name: png(picture) for name, picture in pictures.items()}
    files["drag.json"] = json.dumps(summary(points, result), indent=1).encode()
    write_folder(config.output_dir, files, keep=unowned_files(config.output_dir, OUTPUT_FILES))
    for note in result.notes:
        print(f"Note: {note}.")
    for target, arrived, missed in zip(points[1::2], result.arrived, result.missed, strict=True):
        print(f"{as_text(target)}: arrived at {as_text(arrived)}, {missed:.1f} px from the target")
    print(f"{result.seconds:.1f} s; {', '.join(OUTPUT_FILES)} in {config.output_dir}")
    return config.output_dir


def drag_settings(config: DragConfig) -> DragSettings:
    """The settings that the options give; all others have their defaults."""
    return DragSettings(
        mode=config.mode, steps=config.num_inference_steps, strength=config.strength,
        displacement=config.displacement, fill=config.fill, mask_threshold=config.mask_threshold, seed=config.seed,
    )  # fmt: skip


def interleaved_points(handles: tuple[str, ...], targets: tuple[str, ...]) -> list[Point]:
    """The points of --from and --to, texts "x,y", in the order handle, target, ….  UserError if their counts differ."""
    if len(handles) != len(targets):
        raise UserError(f"{len(handles)} of --from and {len(targets)} of --to: each --from needs a --to")
    return [parse_point(text) for pair in zip(handles, targets, strict=True) for text in pair]


def parse_point(text: str) -> Point:
    """ "120,64.5" → (120.0, 64.5)."""
    try:
        x, y = (float(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"a point is x,y in pixels, for example 120,64; got {text!r}") from None
    return x, y


def as_text(point: Point) -> str:
    """(120.0, 64.5) → "120,64.5"."""
    return ",".join(f"{part:.4g}" for part in point)


def summary(points: list[Point], result: DragResult) -> dict[str, object]:
    """The contents of drag.json."""
    rows = zip(points[::2], points[1::2], result.arrived, result.missed, strict=True)
    drags = [{"from": h, "to": t, "arrived": a, "missed_px": round(m, 2)} for h, t, a, m in rows]
    thresholds = [round(value, 4) for value in result.drag.thresholds]
    times = {"seconds": round(result.seconds, 3), "edit_seconds": round(result.edit_seconds, 3)}
    return {"drags": drags, "mask_thresholds": thresholds, **times, "notes": result.notes}
