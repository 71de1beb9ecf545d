"""`personalize evaluate --run`: make the results of a benchmark that are missing, with one method for all items.

Each finished item is a picture in the folder of results, so that a run that was stopped goes on where it ended.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from personalize.cli.commands.drag import as_text, drag_arguments
from personalize.cli.commands.edit_image import edit_request, photo_settings
from personalize.cli.commands.edit_table import adapter_hashes
from personalize.cli.drag_options import DragConfig
from personalize.cli.edit_options import PhotoConfig
from personalize.cli.parser import parse
from personalize.cli.places import interleaved_points
from personalize.editing.editor import Editor
from personalize.errors import UserError
from personalize.evaluation.benchmarks import BenchmarkItem, find_result
from personalize.io.atomic import write_file
from personalize.io.figures import png
from personalize.io.image_files import load_image
from personalize.io.json_files import read_json
from personalize.io.provenance import EDITED_PHOTO

if TYPE_CHECKING:
    from personalize.cli.options import EvaluateConfig

RECORD = "run.json"  # in the folder of results: with which options they were made
NO_EFFECT = (  # options that write other files or metadata: a benchmark's results are pictures alone
    "report", "preview", "attention_maps", "trajectory", "keep_exif", "metadata", "provenance", "c2pa", "output_dir"
)  # fmt: skip


def make_results(config: EvaluateConfig, name: str, items: Sequence[BenchmarkItem]) -> None:
    """Make every result that `config.results` lacks; an item that cannot be made costs a line of output.

    Raises:
        UserError: the options are wrong, or results in the folder were made with others, or nothing says with which.
    """
    words = shlex.split(config.run or "")
    found = [find_result(config.results, item) for item in items]
    missing = [item for item, path in zip(items, found, strict=True) if path is None]
    parsed, make = _method(name, words)

    def checked(item: BenchmarkItem) -> Any:
        options = parsed(item)
        _require_effect(options)
        options = replace(options, output_dir=config.results, cpu=options.cpu or config.cpu)
        options.check()
        return options

    first = _first_valid(checked, missing or items)
    record: dict[str, Any] = {"benchmark": name, "options": words}
    if missing and (hashes := [adapter_hashes(path) for path in first.adapters]):
        record["adapters"] = hashes
    _check_record(config.results, record, next(filter(None, found), None))
    if not missing:
        return
    editor = Editor.configured(first, first.adapters)
    for number, item in enumerate(missing, 1):
        print(f"{number} of {len(missing)}: {item.name}", flush=True)
        try:
            picture = make(editor, checked(item))
        except UserError as error:
            print(f"{item.name}: not made: {error}")
            continue
        write_file(config.results / f"{item.result}.png", png(picture, EDITED_PHOTO))


def _first_valid(checked: Callable[[BenchmarkItem], Any], items: Sequence[BenchmarkItem]) -> Any:
    """The options of the first item that has valid ones; the first item's UserError if none has."""
    first: UserError | None = None
    for item in items:
        try:
            return checked(item)
        except UserError as error:
            first = first or error
    raise first or UserError("there is nothing to make")


def _method(name: str, words: Sequence[str]) -> tuple[Callable[[BenchmarkItem], Any], Callable[..., Image.Image]]:
    """How an item becomes options, and how these become a picture."""
    if name == "DragBench":
        return lambda item: drag_options(item, words), _dragged
    return lambda item: edit_options(item, words), _edited


def _require_effect(options: PhotoConfig | DragConfig) -> None:
    """UserError for an option that makes no difference to the results."""
    given = {field.name: getattr(options, field.name) for field in fields(options)}
    changed = [name for name in NO_EFFECT if name in given and given[name] != getattr(type(options), name)]
    if isinstance(options, PhotoConfig) and options.from_ is not None:
        changed.append("from")
    if changed:
        flag = f"no_{changed[0]}" if given.get(changed[0]) is False else changed[0]
        raise UserError(f"--run has --{flag}, which makes no difference to a benchmark's results: leave it out")


def edit_options(item: BenchmarkItem, words: Sequence[str]) -> PhotoConfig:
    """The options of `personalize edit PHOTO` for one item.

    Raises:
        UserError: an option is wrong, or is another target; or the benchmark gives no source prompt and the method
            needs one.
    """
    source = item.source_prompt or item.target_prompt  # mutual attention inverts with the empty prompt
    options = parse(PhotoConfig, [str(item.source), "--source", source, "--target", item.target_prompt, *words],
                    prog="personalize edit")  # fmt: skip
    if len(options.target) != 1:
        raise UserError(
            f"--run has the target {options.target[1]!r}: leave it out, the benchmark says what each picture is to show"
        )
    if not item.source_prompt and options.controller != "mutual":
        raise UserError(
            f"{item.name} has no source prompt, which --controller {options.controller} needs: give --run "
            '"--controller mutual", or train an adapter on each picture and put the edits into --results'
        )
    return options


def drag_options(item: BenchmarkItem, words: Sequence[str]) -> DragConfig:
    """The options of `personalize drag` for one item; UserError if one is wrong or a point, or the item has none."""
    if not item.points:
        raise UserError(f"{item.name} names no points: expected points in {item.source.parent}/meta_data.json or .pkl")
    points = [word for handle, target in item.points for word in ("--from", as_text(handle), "--to", as_text(target))]
    prompt = ["--prompt", item.source_prompt] if item.source_prompt else []
    options = parse(DragConfig, [str(item.source), *points, *prompt, *words], prog="personalize drag")
    if more := [*options.from_, *options.to][2 * len(item.points) :]:
        raise UserError(f"--run has the point {more[-1]}: leave it out, the benchmark says from where to where to drag")
    return options


def _edited(editor: Editor, options: PhotoConfig) -> Image.Image:
    settings = photo_settings(options, editor.model.name)
    return editor.photo(load_image(options.photo), options.source, edit_request(options), settings).images[0]


def _dragged(editor: Editor, options: DragConfig) -> Image.Image:
    points = interleaved_points(options.from_, options.to)
    return editor.drag(points, options.photo, paste=options.paste, **drag_arguments(options)).image


def _check_record(results: Path, record: dict[str, Any], made: Path | None) -> None:
    """Write down how the results are made; UserError if `made`, one of those that exist, may have been made otherwise.

    Where there is no result yet, a record is left of a run that made nothing, and is replaced.
    """
    path = results / RECORD
    if made is not None and not path.is_file():
        raise UserError(
            f"{results} holds results such as {made.name}, but no {RECORD} that says how they were made: leave --run "
            "out to measure them, or name another folder with --results"
        )
    before = read_json(path) if made is not None else {}
    if before and {**before, "adapters": None} != {**record, "adapters": None}:
        raise UserError(
            f"{results} holds results of {before.get('benchmark')} made with --run "
            f'"{shlex.join(map(str, before.get("options") or []))}": give that again, or name another folder with '
            "--results"
        )
    if {"adapters"} <= before.keys() & record.keys() and before["adapters"] != record["adapters"]:
        raise UserError(
            f"{results} holds results of an adapter that has changed since: name another folder with --results"
        )
    write_file(path, json.dumps(before | record, indent=1).encode())
