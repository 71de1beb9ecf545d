"""`personalize drag`: drag points or regions of one picture and write the pictures into a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from personalize.editing.drag.config import DragSettings
from personalize.editing.drag.image import DragResult
from personalize.editing.drag.preview import DragPreview
from personalize.editing.editor import Editor
from personalize.errors import UserError
from personalize.io.atomic import unowned_files, write_folder
from personalize.io.figures import png
from personalize.models.image_processor import Point

if TYPE_CHECKING:
    from personalize.cli.edit_options import DragConfig

OUTPUT_FILES = ("dragged.png", "mask.png", "overlay.png", "drag.json")
PREVIEW_FILES = ("mask.png", "warped.png", "void.png", "overlay.png", "preview.json")


def run(config: DragConfig) -> Path:
    """Drag, or show what a drag will do; write the pictures and the facts, and print them in short."""
    points, settings = interleaved_points(config.from_, config.to), drag_settings(config)
    editor = Editor.configured(config, (config.adapter,) if config.adapter else ())
    arguments = {
        "mask": config.mask, "prompt": config.prompt, "settings": settings, "resolution": config.resolution,
        "add": [point_of(text) for text in config.add], "remove": [point_of(text) for text in config.remove],
    }  # fmt: skip
    if config.preview:
        return _write_preview(config, editor.drag_preview(points, config.photo, **arguments))
    return _write_drag(config, points, editor.drag(points, config.photo, paste=config.paste, **arguments))


def _write_preview(config: DragConfig, preview: DragPreview) -> Path:
    facts = {"share": round(preview.share, 4), "arrived": preview.arrived, "seconds": round(preview.seconds, 3)}
    pictures = {
        "mask.png": preview.mask, "warped.png": preview.warped, "void.png": preview.void, "overlay.png": preview.overlay
    }  # fmt: skip
    _write(config, pictures, {"preview.json": facts}, PREVIEW_FILES)
    print(f"moves {preview.share:.1%} of the picture; {', '.join(PREVIEW_FILES)} in {config.output_dir}")
    return config.output_dir


def _write_drag(config: DragConfig, points: list[Any], result: DragResult) -> Path:
    pictures = {"dragged.png": result.image, "mask.png": result.mask, "overlay.png": result.overlay}
    _write(config, pictures, {"drag.json": summary(points, result)}, OUTPUT_FILES)
    for note in result.notes:
        print(f"Note: {note}.")
    if result.preview is not None:
        print(f"moved {result.preview.share:.1%} of the picture")
    for target, arrived, missed in zip(points[1::2], result.arrived, result.missed, strict=True):
        print(f"{as_text(target)}: arrived at {as_text(arrived)}, {missed:.1f} px from the target")
    print(f"{result.seconds:.1f} s; {', '.join(OUTPUT_FILES)} in {config.output_dir}")
    return config.output_dir


def _write(
    config: DragConfig, pictures: dict[str, Image.Image], facts: dict[str, object], owned: tuple[str, ...]
) -> None:
    """Write all files of one result; files of other names in the folder stay."""
    files = {name: png(picture) for name, picture in pictures.items()}
    files |= {name: json.dumps(values, indent=1).encode() for name, values in facts.items()}
    write_folder(config.output_dir, files, keep=unowned_files(config.output_dir, owned))


def drag_settings(config: DragConfig) -> DragSettings:
    """The settings that the options give; all others have their defaults."""
    if config.grow and config.shrink:
        raise UserError(f"--grow {config.grow} and --shrink {config.shrink} undo one another: give one of them")
    for name in ("grow", "shrink"):
        if getattr(config, name) < 0:
            raise UserError(f"--{name} is {getattr(config, name)}, expected 0 or more pixels")
    return DragSettings(
        method=config.method, mode=config.mode, region_map=config.region_map, steps=config.num_inference_steps,
        strength=config.strength, displacement=config.displacement, fill=config.fill, clearance=config.clearance,
        mask_threshold=config.mask_threshold, grow=config.grow - config.shrink, seed=config.seed,
    )  # fmt: skip


def interleaved_points(handles: tuple[str, ...], targets: tuple[str, ...]) -> list[Any]:
    """The points of --from and --to in the order handle, target, ….  UserError if their counts differ."""
    if len(handles) != len(targets):
        raise UserError(f"{len(handles)} of --from and {len(targets)} of --to: each --from needs a --to")
    return [parse_shape(text) for pair in zip(handles, targets, strict=True) for text in pair]


def parse_shape(text: str) -> tuple[Any, ...]:
    """ "120,64.5" → (120.0, 64.5); four numbers are a box, six and more the corners of a polygon."""
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) in (2, 4):
        return tuple(numbers)
    if len(numbers) < 6 or len(numbers) % 2:
        raise UserError(
            f"a point is x,y in pixels, for example 120,64; got {text!r} (a box has 4 numbers, a polygon 6 or more)"
        )
    return tuple(zip(numbers[::2], numbers[1::2], strict=True))


def point_of(text: str) -> Point:
    """ "120,64.5" → (120.0, 64.5)."""
    numbers = parse_shape(text)
    if len(numbers) != 2:
        raise UserError(f"a point is x,y in pixels, for example 120,64; got {text!r}")
    return numbers[0], numbers[1]


def as_text(point: Any) -> str:
    """(120.0, 64.5) → "120,64.5"; a polygon's corners follow one another."""
    return ",".join(as_text(part) if isinstance(part, tuple) else f"{part:.4g}" for part in point)


def summary(points: list[Any], result: DragResult) -> dict[str, object]:
    """The contents of drag.json."""
    rows = zip(points[::2], points[1::2], result.arrived, result.missed, strict=True)
    drags = [{"from": h, "to": t, "arrived": a, "missed_px": round(m, 2)} for h, t, a, m in rows]
    thresholds = [round(value, 4) for value in result.thresholds]
    times = {"seconds": round(result.seconds, 3), "edit_seconds": round(result.edit_seconds, 3)}
    share = {} if result.preview is None else {"share": round(result.preview.share, 4)}
    return {"drags": drags, "mask_thresholds": thresholds, **share, **times, "notes": result.notes}
