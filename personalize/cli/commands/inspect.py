"""`personalize inspect`: say what an adapter file is, what it changes and who can read it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from personalize.cli.redrawing import redraw_command
from personalize.cli.terminal import json_text
from personalize.errors import UserError
from personalize.formats import coverage
from personalize.formats.adapter_folders import is_adapter_folder
from personalize.formats.adapter_source import fetched
from personalize.formats.folder_inspection import FileSummary, folder_text, inspect_folder
from personalize.formats.inspection import inspect_file
from personalize.formats.inspection_report import TITLES, Inspection, report
from personalize.io.atomic import write_file
from personalize.io.figures import png
from personalize.io.image_metadata import IMAGE_SUFFIXES
from personalize.io.provenance import Marks, read_marks

SAID = {  # IPTC's digital source types, in words
    "": "says nothing of its source",
    "trainedAlgorithmicMedia": "made by a model",
    "compositeWithTrainedAlgorithmicMedia": "a photo with parts made by a model",
}

if TYPE_CHECKING:
    from personalize.cli.options import InspectConfig


def run(config: InspectConfig) -> Inspection | list[FileSummary] | Marks:
    """`personalize inspect`: print the inspection as text or JSON, and draw the coverage if `--picture` is given.

    Of a picture, what it says of itself. Of a folder that is no adapter itself, every adapter file in it gets a line.

    Raises:
        UserError: as `inspect_file`; a picture is wanted of a file that changes no module, or of a folder.
    """
    if config.file.suffix.lower() in IMAGE_SUFFIXES:
        return picture_marks(config)
    if config.file.is_dir() and not is_adapter_folder(config.file):
        if config.picture is not None:
            raise UserError(f"{config.file} is a folder, --picture draws one file: leave it out, or name the file")
        rows = inspect_folder(config.file, allow_pickle=config.allow_pickle)
        print(json_text([asdict(row) for row in rows]) if config.json else folder_text(rows))
        return rows
    inspection = inspect_file(fetched(config.file), allow_pickle=config.allow_pickle)
    if config.picture is not None:
        if not inspection.rows:
            raise UserError(f"{config.file} changes no module, so there is no coverage to draw: leave --picture out")
        title = f"{Path(inspection.file).name}: {inspection.layout}, {TITLES[inspection.family]}"
        write_file(config.picture, png(coverage.coverage_picture(inspection.rows, title)))
    print(json_text(asdict(inspection)) if config.json else report(inspection))
    return inspection


def picture_marks(config: InspectConfig) -> Marks:
    """Print how a picture came about, as far as it says so."""
    marks = read_marks(config.file)
    if config.json:
        print(json_text(asdict(marks)))
        return marks
    kind = (marks.source_type or "").rpartition("/")[2]
    print(
        f"{config.file}: {SAID.get(kind, f'says that its source is {kind}' if kind else 'says nothing of its source')}"
    )
    if marks.parameters:
        print(marks.parameters)
    if marks.details:
        inputs = [*marks.details.get("adapters", []), *marks.details.get("files", {}).values()]
        print(*(f"made with {one['name']}, sha256 {one['sha256']}" for one in inputs), sep="\n")
        if marks.details.get("command") in ("edit", "edit PHOTO"):
            print(f"draw it again: {redraw_command(config.file)}")
    return marks
