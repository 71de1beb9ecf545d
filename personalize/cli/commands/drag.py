"""`personalize drag`: drag points or regions of one picture and write the pictures into a folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from personalize.cli.commands.marks import PictureWriter, details_of
from personalize.cli.drag_settings import drag_settings
from personalize.cli.places import interleaved_points, point_of
from personalize.editing.drag.image import DragResult
from personalize.editing.drag.preview import DragPreview
from personalize.editing.editor import Editor
from personalize.errors import said_if_stopped
from personalize.io.figures import png
from personalize.io.image_files import notice_transparency
from personalize.io.json_files import json_bytes
from personalize.io.numbering import add_files

if TYPE_CHECKING:
    from personalize.cli.drag_options import DragConfig


@said_if_stopped("stopped: pictures are written when the drag is finished; the same command begins anew")
def run(config: DragConfig, editor: Editor | None = None) -> Path:
    """Drag, or show what a drag will do; write the pictures and the facts, and print them in short.

    `editor` takes the place of the one that the options describe, if that is loaded already.
    """
    editor = editor or Editor.configured(config, config.adapters)
    if config.preview:
        return _write_preview(config, previewed(config, editor))
    notice_transparency(config.photo)
    points = interleaved_points(config.from_, config.to)
    write, details = PictureWriter(config, config.photo), drag_details(config, editor)  # before the picture is drawn
    result = editor.drag(points, config.photo, paste=config.paste, **drag_arguments(config))
    return _write_drag(config, write, details, points, result)


def previewed(config: DragConfig, editor: Editor) -> DragPreview:
    """What the drag will do."""
    return editor.drag_preview(interleaved_points(config.from_, config.to), config.photo, **drag_arguments(config))


def drag_arguments(config: DragConfig) -> dict[str, Any]:
    """The arguments of `Editor.drag` and `Editor.drag_preview` that the options give, beside the points."""
    return {
        "mask": config.mask, "prompt": config.prompt, "settings": drag_settings(config),
        "resolution": config.resolution, "add": [point_of(text) for text in config.add],
        "remove": [point_of(text) for text in config.remove],
    }  # fmt: skip


def _write_preview(config: DragConfig, preview: DragPreview) -> Path:
    facts = {"share": round(preview.share, 4), "arrived": preview.arrived, "seconds": round(preview.seconds, 3)}
    drawn = {"mask": preview.mask, "warped": preview.warped, "void": preview.void, "overlay": preview.overlay}
    pictures = {f"{name}.png": png(picture) for name, picture in drawn.items()}
    names = _write(config, pictures, {"preview.json": facts})
    print(f"moves {preview.share:.1%} of the picture; {', '.join(names.values())} in {config.output_dir}")
    return config.output_dir


def drag_details(config: DragConfig, editor: Editor) -> dict[str, Any]:
    """What makes the drag again, without the result's size; see `details_of`."""
    masks = {"mask": config.mask} if config.mask else {}
    return details_of(
        "drag", config, editor, config.adapters, files={"photo": config.photo, **masks}, prompt=config.prompt or "",
        seed=config.seed, steps=config.num_inference_steps, scheduler="ddim", options={"from": list(config.from_)},
    )  # fmt: skip


def _write_drag(
    config: DragConfig, write: PictureWriter, details: dict[str, Any], points: list[Any], result: DragResult
) -> Path:
    details = details | {"size": "x".join(map(str, result.image.size))}
    pictures = {"mask.png": png(result.mask), "overlay.png": png(result.overlay)}
    pictures = {"dragged.png": write(result.image, details), **pictures}
    names = _write(config, pictures, {"drag.json": summary(points, result)})
    for note in result.notes:
        print(f"Note: {note}.")
    if result.preview is not None:
        print(f"moved {result.preview.share:.1%} of the picture")
    for target, arrived, missed in zip(points[1::2], result.arrived, result.missed, strict=True):
        print(f"{as_text(target)}: arrived at {as_text(arrived)}, {missed:.1f} px from the target")
    print(f"{result.seconds:.1f} s; {', '.join(names.values())} in {config.output_dir}")
    return config.output_dir


def _write(config: DragConfig, pictures: dict[str, bytes], facts: dict[str, object]) -> dict[str, str]:
    """Write all files of one result under names that are not taken; returns these, by the plain ones."""
    files = pictures | {name: json_bytes(values) for name, values in facts.items()}
    return add_files(config.output_dir, files)


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
