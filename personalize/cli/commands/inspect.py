"""`personalize inspect`: say what an adapter file is, what it changes and who can read it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from personalize.errors import UserError
from personalize.formats import coverage
from personalize.formats.adapter_source import is_adapter_folder
from personalize.formats.folder_inspection import FileSummary, folder_text, inspect_folder
from personalize.formats.inspection import FAMILIES, Inspection, inspect_file, report
from personalize.io.atomic import write_file
from personalize.io.figures import png

if TYPE_CHECKING:
    from personalize.cli.options import InspectConfig


def run(config: InspectConfig) -> Inspection | list[FileSummary]:
    """`personalize inspect`: print the inspection as text or JSON, and draw the coverage if `--picture` is given.

    Of a folder that is no adapter itself, every adapter file in it gets a line.

    Raises:
        UserError: as `inspect_file`; a picture is wanted of a file that changes no module, or of a folder.
    """
    if config.file.is_dir() and not is_adapter_folder(config.file):
        if config.picture is not None:
            raise UserError(f"{config.file} is a folder, --picture draws one file: leave it out, or name the file")
        rows = inspect_folder(config.file, allow_pickle=config.allow_pickle)
        print(
            json.dumps([asdict(row) for row in rows], indent=2, ensure_ascii=False)
            if config.json
            else folder_text(rows)
        )
        return rows
    inspection = inspect_file(config.file, allow_pickle=config.allow_pickle)
    if config.picture is not None:
        if not inspection.rows:
            raise UserError(f"{config.file} changes no module, so there is no coverage to draw: leave --picture out")
        title = f"{Path(inspection.file).name}: {inspection.layout}, {FAMILIES[inspection.family]}"
        write_file(config.picture, png(coverage.coverage_picture(inspection.rows, title)))
    print(json.dumps(asdict(inspection), indent=2, ensure_ascii=False) if config.json else report(inspection))
    return inspection
