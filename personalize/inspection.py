"""Inspect: what an adapter file is, what it changes, who can read it, and what is wrong with it.

personalize inspect FILE [--json] [--picture out.png]
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from personalize import compatibility, coverage, layouts
from personalize.errors import UserError
from personalize.files import TensorFile, write_file
from personalize.layouts import FileContents
from personalize.pickles import is_pickle, read_any
from personalize.pictures import png
from personalize.reader_names import adaptable_layers, empty_unet

if TYPE_CHECKING:
    from personalize.commands import InspectConfig

FAMILIES = {"sd1": "Stable Diffusion 1.x", "sd2": "Stable Diffusion 2.x", "sdxl": "SDXL", None: "unknown"}
SHOWN = 12  # metadata and problems in the text; --json has all
WORD = 200  # characters of one metadata value in the text


@dataclass(frozen=True)
class Inspection:
    """Everything `personalize inspect` tells of a file; JSON-able by `asdict`."""

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
    """alpha / rank → modules."""
    rows: list[coverage.BlockCoverage]
    tokens: list[dict[str, Any]]
    readers: dict[str, tuple[str, str]]
    problems: list[str]
    metadata: dict[str, str]


def run(config: InspectConfig) -> Inspection:
    """`personalize inspect`: print what the file is, as text or JSON, and draw its coverage if asked."""
    found = inspect_file(config.file, allow_pickle=config.allow_pickle)
    if config.picture is not None:
        if not found.rows:
            raise UserError(f"{config.file} changes no module: there is no coverage to draw")
        title = f"{Path(found.file).name}: {found.layout}, {FAMILIES[found.family]}"
        write_file(config.picture, png(coverage.coverage_picture(found.rows, title)))
    print(json.dumps(asdict(found), indent=2, ensure_ascii=False) if config.json else report(found))
    return found


def inspect_file(path: str | Path, *, allow_pickle: bool = False) -> Inspection:
    """Inspect one file.

    Raises:
        UserError: missing, damaged, or a pickle that is not allowed; an adapter that is merely odd is reported on.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder: name one of its files, or verify the folder with `personalize verify`")
    content = read_any(path, allow_pickle=allow_pickle)
    found = layouts.classify_tensors(content.tensors)
    family, reason = layouts.detect_family(found, content.metadata)
    strengths, problems = _strengths(found, content.metadata)
    findings = compatibility.findings(found, content.metadata, family)
    problems = [finding.text for finding in findings] + problems + _number_problems(found) + _foreign(found, family)
    readers = compatibility.readers(found, findings)
    if is_pickle(path):
        problems.append("it is a pickle, which can run code in programs that open it carelessly: convert it")
    factors = [tensor for parts in found.modules.values() for role, tensor in parts.items() if role != "alpha"]
    tensors = [*factors, *found.embeddings.values()]
    return Inspection(
        file=str(path), bytes=path.stat().st_size, layout=layout(found), family=family, family_by=reason,
        algorithms=dict(found.algorithm_counts), components=dict(Counter(m.partition(".")[0] for m in found.modules)),
        parameters=sum(tensor.numel() for tensor in tensors),
        dtypes=dict(Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors)),
        ranks=_counts(parts["A"].shape[0] for parts in found.modules.values() if "A" in parts and parts["A"].ndim),
        strengths=_counts(strengths.values()), rows=_rows(found, strengths, family),
        tokens=_tokens(found, content, path), readers=readers, problems=problems, metadata=dict(content.metadata),
    )  # fmt: skip


def layout(found: FileContents) -> str:
    """One phrase for what the file is."""
    spelled = " and ".join(found.naming_schemes) + " names" if found.naming_schemes else ""
    kinds = " and ".join(sorted(found.algorithm_counts))
    words = [f"{kinds} in {spelled}" if kinds and spelled else spelled, found.file_kind]
    return ", ".join(word for word in words if word) or "nothing known"


def _counts(values: Any) -> dict[str, int]:
    counted = Counter(values)
    return {f"{value:.6g}": count for value, count in sorted(counted.items())}


def _strengths(found: FileContents, metadata: Mapping[str, str]) -> tuple[dict[str, float], list[str]]:
    """alpha / rank of every module that has one, and what is wrong with the rest."""
    strengths, problems = {}, []
    try:
        told = layouts.peft_settings(metadata, "the file")
    except UserError as error:
        told, problems = {}, [str(error)]
    for module, parts in found.modules.items():
        if "A" in parts and parts["A"].ndim and parts["A"].shape[0]:
            try:
                strengths[module] = layouts.scaling(module, parts, told)
            except UserError as error:
                problems.append(str(error))
    return strengths, problems


def _number_problems(found: FileContents) -> list[str]:
    """Halves, shapes that make no pair, numbers that are not finite, and modules that change nothing."""
    problems, still = [], 0
    for module, parts in found.modules.items():
        spoilt = [role for role, tensor in parts.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
        if spoilt:
            problems.append(f"module {module} holds a number that is not finite (in {spoilt[0]})")
        if not found.algorithms.get(module, set()) <= {"LoRA"}:
            continue
        if set(parts) & {"A", "B"} != {"A", "B"}:
            problems.append(f"module {module} has only {sorted(parts)} of its two matrices")
        elif not _makes_pair(parts["A"], parts["B"]):
            shapes = f"{tuple(parts['A'].shape)} and {tuple(parts['B'].shape)}"
            problems.append(f"module {module}: shapes {shapes} make no pair")
        else:
            still += not (bool(parts["A"].any()) and bool(parts["B"].any()))
    if still:
        problems.append(f"{still} module(s) are zero and change nothing: were they trained?")
    return problems


def _makes_pair(a: Tensor, b: Tensor) -> bool:
    return a.ndim == b.ndim and a.ndim in (2, 4) and a.shape[0] == b.shape[1] and b.shape[2:].numel() == 1


def _foreign(found: FileContents, family: str | None) -> list[str]:
    """Modules that the family's UNet does not have."""
    if family is None:
        return ["the family cannot be told: it may be for a model of another kind"] if found.modules else []
    there = {f"unet.{path}" for path, _ in adaptable_layers(empty_unet(family))}
    foreign = [module for module in found.modules if module.startswith("unet.") and module not in there]
    return [f"{len(foreign)} module(s) are not in a UNet of {family}, first {foreign[0][:120]!r}"] if foreign else []


def _rows(found: FileContents, strengths: Mapping[str, float], family: str | None) -> list[coverage.BlockCoverage]:
    norms: dict[str, float | None] = {}
    for module, parts in found.modules.items():
        plain = found.algorithms.get(module) == {"LoRA"} and "A" in parts and "B" in parts
        whole = plain and module in strengths and _makes_pair(parts["A"], parts["B"])
        norms[module] = coverage.norm_of(parts["A"], parts["B"], strengths[module]) if whole else None
    return coverage.coverage_table(norms, family) if norms else []


def _tokens(found: FileContents, content: TensorFile, path: Path) -> list[dict[str, Any]]:
    """Learned token vectors: key, what calls them, how many, how wide."""
    tokens = []
    for key, tensor in found.embeddings.items():
        name = content.metadata.get("name") or path.stem
        word = key if found.file_kind.endswith("diffusers form") else key.split(".")[1] if "bundle_emb." in key else name
        shape = (1, *tensor.shape) if tensor.ndim == 1 else tuple(tensor.shape)
        tokens.append(
            {"key": key, "token": word, "vectors": shape[0] if shape else 0, "width": shape[-1] if shape else 0}
        )
    return tokens


def report(found: Inspection) -> str:
    """The inspection for a terminal."""
    lines = [
        f"{found.file}: {found.layout}, {found.bytes:,} bytes",
        f"family      {FAMILIES[found.family]} ({found.family_by})",
    ]
    if found.components:
        parts = ", ".join(f"{count} in {name}" for name, count in found.components.items())
        lines += [f"modules     {sum(found.components.values())} ({parts}), {found.parameters:,} parameters, "
                  f"{', '.join(found.dtypes)}"]  # fmt: skip
        lines += [f"rank        {_spread(found.ranks)}", f"alpha/rank  {_spread(found.strengths)}"]
    for token in found.tokens:
        lines.append(
            f"token       {token['token']}: {token['vectors']} vector(s) of width {token['width']} ({token['key']})"
        )
    if found.rows:
        lines += ["", coverage.coverage_text(found.rows)]
    lines += ["", "read by"]
    lines += [f"  {name:12}{verdict:8}{reason}".rstrip() for name, (verdict, reason) in found.readers.items()]
    if found.problems:
        lines += ["", "problems", *_some([f"  {problem}" for problem in found.problems])]
    if found.metadata:
        told = [f"  {key[:60]} = {' '.join(value.split())[:WORD]}" for key, value in sorted(found.metadata.items())]
        lines += ["", "metadata", *_some(told)]
    return "\n".join("".join(c if c.isprintable() or c == "\n" else "?" for c in line) for line in lines)


def _spread(values: Mapping[str, int]) -> str:
    if not values:
        return "-"
    if len(values) == 1:
        return next(iter(values))
    return ", ".join(f"{value} ({count} modules)" for value, count in list(values.items())[:SHOWN])


def _some(lines: list[str]) -> list[str]:
    hidden = len(lines) - SHOWN
    return lines[:SHOWN] + ([f"  and {hidden} more (--json has all)"] if hidden > 0 else [])
