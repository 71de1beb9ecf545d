"""Inspect every adapter file in a folder at once: one line for each, from the headers alone.

Of a file only the header and tensors of a few numbers (alphas) are read; what depends on the other numbers (whether
they are finite, how strongly blocks are changed) is left to `inspection.inspect_file`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from personalize.errors import UserError
from personalize.formats import compatibility, layouts
from personalize.formats.adapter_folders import INDEX, is_adapter_folder
from personalize.formats.adapter_source import open_adapter
from personalize.formats.coverage import aligned_columns
from personalize.formats.diffusion_transformers.families import FAMILIES
from personalize.formats.diffusion_transformers.reading import identify, sort
from personalize.formats.diffusion_transformers.summary import folder_readings
from personalize.formats.diffusion_transformers.summary import layout as transformer_layout
from personalize.formats.foreign_files import require_adapter
from personalize.formats.inspection import layout, learned_tokens, modules_elsewhere
from personalize.formats.inspection_report import size_of
from personalize.io.pickles import is_pickle
from personalize.io.plain_files import visible
from personalize.io.tensor_files import PICKLE_SUFFIXES, TensorFile

SUFFIXES = {".safetensors", *PICKLE_SUFFIXES}
PEEK = 16  # numbers: tensors of up to so many are read, larger ones have a shape alone
WIDTH = 60  # characters of a cell


@dataclass(frozen=True)
class FileSummary:
    """One line of the table.

    what: the layout, or why the file cannot be read.  readers: "yes", "unknown", "partly" or "no" by program.
    problems: what is wrong with it, the first first.
    """

    file: str
    bytes: int
    what: str
    family: str = ""
    modules: int = 0
    ranks: str = ""
    tokens: tuple[str, ...] = ()
    readers: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def inspect_folder(folder: Path, *, allow_pickle: bool = False) -> list[FileSummary]:
    """A summary of every adapter file in `folder`, and of every folder of PEFT in it, by name.

    Raises:
        UserError: the folder holds none.
    """
    shards = {name for index in visible(folder, f"*{INDEX}") for name in folder.glob(f"{index.name[: -len(INDEX)]}-*")}
    entries = [entry for entry in visible(folder) if _is_adapter(entry) and entry not in shards]
    if not entries:
        raise UserError(f"{folder} holds no file that could be an adapter: name another folder, or a file")
    return [_summary(entry, allow_pickle) for entry in entries]


def _is_adapter(entry: Path) -> bool:
    if entry.is_dir():
        return is_adapter_folder(entry)
    return entry.is_file() and (entry.suffix.lower() in SUFFIXES or entry.name.endswith(INDEX))


def _summary(path: Path, allow_pickle: bool) -> FileSummary:
    """The line of one file; whatever is wrong with it is part of the line."""
    size = size_of(path)
    try:
        if is_pickle(path) and not allow_pickle:
            pickled = "a pickle: --allow_pickle reads its tensors"
            return FileSummary(path.name, size, pickled, problems=["it is a pickle"])
        content = open_adapter(path, allow_pickle=allow_pickle, peek=PEEK)
        if (found := identify(content)) is not None:
            return _transformer_summary(path, size, content, found[0])
        contents = layouts.classify_tensors(content.tensors)
        family = layouts.detect_family(contents, content.metadata)[0]
        findings = compatibility.findings(contents, content.metadata, family)
    except UserError as error:
        reason = str(error).replace(str(path), "").lstrip(" :")
        return FileSummary(path.name, size, f"cannot be read: {reason}", problems=[reason])
    readers = compatibility.readers(contents, findings, modules_elsewhere(contents, family))
    problems = [finding.text for finding in findings]
    try:
        require_adapter(contents, path)
    except UserError as error:
        reason = str(error).removeprefix(str(path)).lstrip(" :")
        readers, problems = readers | {"personalize": (compatibility.NO, reason)}, [reason, *problems]
    ranks = sorted({parts["A"].shape[0] for parts in contents.modules.values() if "A" in parts and parts["A"].ndim})
    tokens = tuple(dict.fromkeys(one["token"] for one in learned_tokens(contents, content, path)))
    return FileSummary(
        path.name, size, layout(contents), family or "", len(contents.modules), _span(ranks), tokens,
        {program: verdict for program, (verdict, _) in readers.items()}, problems,
    )  # fmt: skip


def _transformer_summary(path: Path, size: int, content: TensorFile, family: str) -> FileSummary:
    """The line of a LoRA file for a diffusion transformer."""
    file = sort(content, family)
    ranks = sorted({len(parts["A"]) for parts in file.parts.values() if "A" in parts and parts["A"].ndim})
    title = FAMILIES[family].title
    problems = [f"{len(file.unknown)} key(s) belong to no layer of {title}"] if file.unknown else []
    readers = {program: verdict for program, (verdict, _) in folder_readings(file).items()}
    return FileSummary(path.name, size, transformer_layout(file), family, len(file.parts), _span(ranks), (), readers,
                       problems)  # fmt: skip


def _span(values: list[int]) -> str:
    """ "4" for one value, "1–8" for several."""
    return "" if not values else str(values[0]) if len(values) == 1 else f"{values[0]}–{values[-1]}"


def folder_text(rows: Iterable[FileSummary]) -> str:
    """The table as text for a terminal; characters that are not printable become "?"."""
    lines = [["file", "MB", "what it is", "family", "modules", "rank", "tokens", "read by", "problems"]]
    for row in rows:
        read_by = ", ".join(program for program, verdict in row.readers.items() if verdict == compatibility.YES)
        first = f"{len(row.problems)}: {row.problems[0]}" if row.problems and row.readers else ""
        cells = [
            row.file,
            f"{row.bytes / 1e6:.1f}",
            row.what,
            row.family,
            row.modules or "",
            row.ranks,
            ", ".join(row.tokens),
        ]
        lines.append([_cell(str(cell)) for cell in [*cells, read_by if row.readers else "", first]])
    return aligned_columns(lines)


def _cell(text: str) -> str:
    """One line of at most WIDTH printable characters."""
    text = "".join(character if character.isprintable() else "?" for character in " ".join(text.split()))
    return text if len(text) <= WIDTH else f"{text[: WIDTH - 1]}…"
