"""What `personalize inspect` reports about an adapter file, as a value and as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from personalize.formats import coverage
from personalize.formats.diffusion_transformers.families import FAMILIES as TRANSFORMERS

TITLES = {"sd1": "Stable Diffusion 1.x", "sd2": "Stable Diffusion 2.x", "sdxl": "SDXL", None: "unknown"} | {
    name: family.title for name, family in TRANSFORMERS.items()
}
MAX_LINES = 12  # of metadata, and of problems, in the text; --json prints all
MAX_VALUE_LENGTH = 200  # characters of one metadata value in the text


@dataclass(frozen=True)
class Inspection:
    """Everything that `personalize inspect` reports about a file; `--json` prints these fields under their names."""

    file: str
    bytes: int
    layout: str
    family: str | None
    family_by: str
    algorithms: dict[str, int]
    components: dict[str, int]
    parameters: int
    dtypes: dict[str, int]
    ranks: dict[str, int]
    strengths: dict[str, int]
    """Number of modules for each value of alpha / r; `ranks` likewise for r."""
    rows: list[coverage.BlockCoverage]
    tokens: list[dict[str, Any]]
    readers: dict[str, tuple[str, str]]
    problems: list[str]
    metadata: dict[str, str]
    captions: list[str] = field(default_factory=list)
    """Of the pictures that an adapter folder was trained on; each has a source embedding."""
    training: list[str] = field(default_factory=list)
    """What to know of the training of an adapter folder."""
    writer: str = ""
    """The program that wrote the file, as far as it tells."""
    dropped: dict[str, list[str]] = field(default_factory=dict)
    """The modules that each program drops, or applies at another strength, by name."""


def size_of(path: Path) -> int:
    """The size in bytes of a file, or of all files in a folder."""
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


def counts(values: Any) -> dict[str, int]:
    """How often each number occurs, by the number as text, in rising order."""
    counted = Counter(values)
    return {f"{value:.6g}": count for value, count in sorted(counted.items())}


def report(inspection: Inspection) -> str:
    """The inspection as text for a terminal; characters that are not printable become "?"."""
    lines = [
        f"{inspection.file}: {inspection.layout}, {inspection.bytes:,} bytes",
        f"family      {TITLES[inspection.family]} ({inspection.family_by})",
    ]
    lines += [f"written by  {inspection.writer}"] if inspection.writer else []
    if inspection.components:
        parts = ", ".join(f"{count} in {name}" for name, count in inspection.components.items())
        lines += [f"modules     {sum(inspection.components.values())} ({parts}), {inspection.parameters:,} parameters, "
                  f"{', '.join(inspection.dtypes)}"]  # fmt: skip
        lines += [f"rank        {_values_text(inspection.ranks)}", f"alpha/rank  {_values_text(inspection.strengths)}"]
    for token in inspection.tokens:
        lines.append(
            f"token       {token['token']}: {token['vectors']} vector(s) of width {token['width']} ({token['key']})"
        )
    lines += [f"caption     {caption}" for caption in inspection.captions[:MAX_LINES]]
    lines += [f"training    {note}" for note in inspection.training]
    if inspection.rows:
        lines += ["", coverage.coverage_text(inspection.rows)]
    lines += ["", "read by"]
    lines += [f"  {name:12}{verdict:8}{reason}".rstrip() for name, (verdict, reason) in inspection.readers.items()]
    for program, modules in inspection.dropped.items():
        lines += ["", f"dropped by {program}, or changed", *_first_lines([f"  {module}" for module in modules])]
    if inspection.problems:
        lines += ["", "problems", *_first_lines([f"  {problem}" for problem in inspection.problems])]
    if inspection.metadata:
        values = [(key[:60], " ".join(value.split())) for key, value in sorted(inspection.metadata.items())]
        lines += ["", "metadata", *_first_lines([f"  {key} = {value[:MAX_VALUE_LENGTH]}" for key, value in values])]
    return "\n".join("".join(c if c.isprintable() or c == "\n" else "?" for c in line) for line in lines)


def _values_text(values: Mapping[str, int]) -> str:
    """The value that all modules share, or each value with the number of modules that have it."""
    if not values:
        return "-"
    if len(values) == 1:
        return next(iter(values))
    return ", ".join(f"{value} ({count} modules)" for value, count in list(values.items())[:MAX_LINES])


def _first_lines(lines: list[str]) -> list[str]:
    """At most `MAX_LINES` lines, and one that says how many are left out."""
    omitted = len(lines) - MAX_LINES
    return lines[:MAX_LINES] + ([f"  and {omitted} more (--json has all)"] if omitted > 0 else [])
