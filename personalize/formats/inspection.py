"""Inspect an adapter file: its layout, the modules it changes, the programs that read it, and its problems.

personalize inspect FILE [--json] [--picture out.png]
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from personalize.errors import Notice, UserError
from personalize.formats import compatibility, coverage, layouts, peft_settings
from personalize.formats.adapter_folders import MANIFEST
from personalize.formats.adapter_source import open_adapter
from personalize.formats.diffusion_transformers.reading import identify
from personalize.formats.diffusion_transformers.summary import summarized
from personalize.formats.foreign_files import as_lora, read_adapter_file
from personalize.formats.inspection_report import Inspection, counts, size_of
from personalize.formats.layer_kinds import fitting_families, known_paths
from personalize.formats.layouts import FileContents
from personalize.formats.manifest import is_part_of_adapter
from personalize.formats.textual_inversion_files import BUNDLE, bundled_token, unread_rows
from personalize.formats.timestep_rank import HEADER_KEY, read_rule, warning, with_rule
from personalize.formats.trainers import written_by
from personalize.formats.training_notes import training_notes
from personalize.io.json_files import read_json
from personalize.io.output_folder import is_tensor_name
from personalize.io.pickles import is_pickle
from personalize.io.tensor_files import TensorFile


def inspect_file(path: str | Path, *, allow_pickle: bool = False) -> Inspection:
    """Inspect one adapter file; whatever is wrong with a readable file becomes part of the result.

    Raises:
        UserError: a file that is missing, damaged, or a pickle without `allow_pickle`.
    """
    path = Path(path)
    content = open_adapter(path, allow_pickle=allow_pickle)
    if (found := identify(content)) is not None:
        return summarized(path, content, *found, pickle=is_pickle(path))
    contents = layouts.classify_tensors(content.tensors)
    family, evidence = layouts.detect_family(contents, content.metadata)
    scalings, problems = _scalings(contents, content.metadata)
    findings = compatibility.findings(contents, content.metadata, family)
    problems = [finding.text for finding in findings] + problems + _matrix_problems(contents)
    problems += _modules_not_in_model(contents, family) + _timestep_rank(path, content.metadata)
    problems += [unread] if (unread := unread_rows(content)) else []
    unknown = modules_elsewhere(contents, family)
    readers = compatibility.readers(contents, findings, unknown) | {"personalize": _own_verdict(path, content, unknown)}
    if is_pickle(path):
        problems.append("it is a pickle, which can run code in programs that open it carelessly: convert it")
    modules = contents.modules
    factors = [tensor for parts in modules.values() for role, tensor in parts.items() if role != "alpha"]
    tensors = [*factors, *contents.embeddings.values()]
    return Inspection(
        file=str(path), bytes=size_of(path), layout=layout(contents), family=family, family_by=evidence,
        algorithms=dict(contents.algorithm_counts), components=dict(Counter(m.partition(".")[0] for m in modules)),
        parameters=sum(tensor.numel() for tensor in tensors),
        dtypes=dict(Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors)),
        ranks=counts(parts["A"].shape[0] for parts in modules.values() if "A" in parts and parts["A"].ndim),
        strengths=counts(scalings.values()), rows=_coverage(contents, scalings, family),
        tokens=learned_tokens(contents, content, path), readers=readers, problems=problems,
        metadata=dict(content.metadata),
        captions=_captions(about := _manifest(path)), training=training_notes(about),
        dropped=compatibility.dropped(findings, unknown, len(modules)),
        writer=written_by(content.metadata, contents.naming_schemes) if modules else "",
    )  # fmt: skip


def layout(contents: FileContents) -> str:
    """What the file is, in one phrase, such as "LoRA in kohya names"."""
    names = " and ".join(contents.naming_schemes) + " names" if contents.naming_schemes else ""
    algorithms = " and ".join(sorted(contents.algorithm_counts))
    phrases = [f"{algorithms} in {names}" if algorithms and names else names, contents.file_kind]
    return ", ".join(phrase for phrase in phrases if phrase) or "nothing known"


def _scalings(contents: FileContents, metadata: Mapping[str, str]) -> tuple[dict[str, float], list[str]]:
    """alpha / r of every module for which it can be computed, and the reasons why it cannot for the others."""
    scalings, problems = {}, []
    try:
        settings = peft_settings.settings_of(metadata, "the file")
    except UserError as error:
        settings, problems = {}, [str(error)]
    for module, parts in contents.modules.items():
        if "A" in parts and parts["A"].ndim and parts["A"].shape[0]:
            try:
                scalings[module] = peft_settings.scaling(module, parts, settings)
            except UserError as error:
                problems.append(str(error))
    return scalings, list(dict.fromkeys(problems))


def _matrix_problems(contents: FileContents) -> list[str]:
    """Modules without A or B, with shapes that do not fit, with numbers that are not finite, or that change nothing."""
    problems, zero = [], 0
    for module, parts in contents.modules.items():
        infinite = [
            role for role, tensor in parts.items() if tensor.is_floating_point() and not tensor.float().isfinite().all()
        ]
        if infinite:
            problems.append(f"module {module} holds a number that is not finite (in {infinite[0]})")
        if not contents.algorithms.get(module, set()) <= {"LoRA"}:
            continue
        if set(parts) & {"A", "B"} != {"A", "B"}:
            problems.append(f"module {module} has only {sorted(parts)} of its two matrices")
        elif not _makes_pair(parts["A"], parts["B"]):
            shapes = f"{tuple(parts['A'].shape)} and {tuple(parts['B'].shape)}"
            problems.append(f"module {module}: shapes {shapes} make no pair")
        else:
            zero += not (bool(parts["A"].any()) and bool(parts["B"].any()))
    if zero:
        problems.append(f"{zero} module(s) are zero and change nothing: were they trained?")
    return problems


def _makes_pair(a: Tensor, b: Tensor) -> bool:
    """True if B A can be computed: A is (r, in[, k, k]) and B is (out, r[, 1, 1])."""
    return a.ndim == b.ndim and a.ndim in (2, 4) and a.shape[0] == b.shape[1] and b.shape[2:].numel() == 1


def modules_elsewhere(contents: FileContents, family: str | None) -> list[str]:
    """The modules that no model of the family has; if it is not known, those that no family's model has."""
    families = [family] if family else fitting_families(contents.modules)
    known = frozenset().union(*(known_paths(name) for name in families))
    return [module for module in contents.modules if module not in known]


def _modules_not_in_model(contents: FileContents, family: str | None) -> list[str]:
    """As a problem: modules that the family's models do not have, or a family that is not known."""
    if not contents.modules:
        return []
    if not fitting_families(contents.modules):
        first = next(iter(contents.key_stems.values()))[:120]
        return [f"none of its modules, first {first!r}, is in a model of SD 1, 2 or XL"]
    others = modules_elsewhere(contents, family)
    named = f"a model of {family}" if family else "any model of SD 1, 2 or XL"
    found = [f"{len(others)} module(s) are not in {named}, first {others[0][:120]!r}"] if others else []
    return found if family else [*found, "nothing in it tells its family: say --family where one is needed"]


def _own_verdict(path: Path, content: TensorFile, elsewhere: Sequence[str]) -> tuple[str, str]:
    """Whether this program reads the file, by reading it; `elsewhere` are its modules that no model has."""
    try:
        with warnings.catch_warnings(action="ignore", category=Notice):  # what it says is among the problems
            file = read_adapter_file(path, content)
    except UserError as error:
        return compatibility.NO, str(error).removeprefix(f"{path}").lstrip(": ")
    if elsewhere:
        return compatibility.refused(elsewhere)
    try:
        lines = as_lora(file)[1]
    except UserError as error:
        return compatibility.PARTLY, f"attach, edit and export checkpoint take it; {error}"
    return (compatibility.PARTLY, f"convert: {lines[0]}") if lines else (compatibility.YES, "")


def _timestep_rank(path: Path, metadata: Mapping[str, str]) -> list[str]:
    """As a problem: a rank that depends on the timestep, by the file's header or the adapter folder it is part of."""
    try:
        rule = read_rule(with_rule(path, metadata).get(HEADER_KEY), path)
    except UserError as error:
        return [str(error)]
    return [] if rule is None else [warning(rule)]


def _manifest(path: Path) -> dict[str, Any]:
    """The manifest of the adapter folder that the file at `path` is part of; empty if it is of none."""
    part = is_tensor_name(path) and is_part_of_adapter(path)
    return read_json(path.parent / MANIFEST) if part else {}


def _captions(info: Mapping[str, Any]) -> list[str]:
    captions = info.get("captions") or [info.get("caption")]
    return [caption for caption in captions if isinstance(caption, str) and caption]


def _coverage(
    contents: FileContents, scalings: Mapping[str, float], family: str | None
) -> list[coverage.BlockCoverage]:
    """The coverage of every block; norms are computed of LoRA modules only, not of other algorithms."""
    norms: dict[str, float | None] = {}
    for module, parts in contents.modules.items():
        is_lora = contents.algorithms.get(module) == {"LoRA"} and "A" in parts and "B" in parts
        complete = is_lora and module in scalings and _makes_pair(parts["A"], parts["B"])
        norms[module] = coverage.norm_of(parts["A"], parts["B"], scalings[module]) if complete else None
    return coverage.coverage_table(norms, family) if norms else []


def learned_tokens(contents: FileContents, content: TensorFile, path: Path) -> list[dict[str, Any]]:
    """The learned tokens of a file: key, token (or trigger), number of vectors, width."""
    tokens = []
    for key, tensor in contents.embeddings.items():
        token = content.metadata.get("name") or path.stem
        if contents.file_kind.endswith("diffusers form"):
            token = key
        elif key.startswith(BUNDLE):
            token = bundled_token(key)[0]
        shape = (1, *tensor.shape) if tensor.ndim == 1 else tuple(tensor.shape)
        vectors, width = (shape[0], shape[-1]) if shape else (0, 0)
        tokens.append({"key": key, "token": token, "vectors": vectors, "width": width})
    return tokens
