"""What `inspect` says of a LoRA file for a diffusion transformer: what it covers, who reads it, what is wrong."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from personalize.errors import UserError
from personalize.formats import coverage
from personalize.formats.algorithms import algorithm_of
from personalize.formats.compatibility import NO, PARTLY, PROGRAMS, UNKNOWN
from personalize.formats.diffusion_transformers.families import FAMILIES
from personalize.formats.diffusion_transformers.readers import through_comfyui, through_diffusers
from personalize.formats.diffusion_transformers.reading import (
    SortedFile,
    TransformerLora,
    model_of,
    read,
    scheme_counts,
    sort,
)
from personalize.formats.diffusion_transformers.skeletons import models
from personalize.formats.inspection_report import Inspection, counts, size_of
from personalize.formats.peft_settings import scaling, settings_of
from personalize.formats.trainers import written_by
from personalize.io.tensor_files import TensorFile

OURS = (PARTLY, "inspect, convert and verify take it; attach, edit and export know SD 1, 2 and XL alone")
NOT_READ = (UNKNOWN, "its rules for this family were not read")
KINDS = (  # the first whose pattern is in a layer's path
    (re.compile(r"attn|attention|SelfAttention"), "attention"),
    (re.compile(r"\bff|mlp|feed_forward|DenseReluDense|img_mlp|txt_mlp"), "feed-forward"),
    (re.compile(r"norm|mod|adaLN|adaln"), "modulation"),
    (re.compile(r"proj_out|linear2"), "projection"),
)


def summarized(path: Path, content: TensorFile, family: str, evidence: str, *, pickle: bool = False) -> Inspection:
    """The inspection of a file of a known family; whatever is wrong with it becomes part of the result."""
    file = sort(content, family)
    model, misfits = model_of(file)
    problems = _problems(file, misfits) + (["it is a pickle, which can run code: convert it"] if pickle else [])
    lora, readings = None, {"ComfyUI": through_comfyui(file)}
    try:
        lora = read(path, content, family)
        readings["diffusers"] = through_diffusers(content, lora)
        verdicts = {"personalize": OURS, **{name: one.verdict for name, one in readings.items()}}
        problems += _without_effect(lora)
    except UserError as error:
        reason = str(error).removeprefix(f"{path}").lstrip(": ")
        verdicts = {"personalize": (NO, reason), "ComfyUI": readings["ComfyUI"].verdict}
        problems.append(reason)
    modules = list(file.parts.values())
    tensors = [tensor for parts in modules for role, tensor in parts.items() if role != "alpha"]
    return Inspection(
        file=str(path), bytes=size_of(path), layout=layout(file), family=family,
        family_by=f"{evidence}; the sizes of {model}" if model else evidence, components=_components(file),
        algorithms=dict(Counter(algorithm_of(parts) for parts in modules)),
        parameters=sum(tensor.numel() for tensor in tensors),
        dtypes=dict(Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors)),
        ranks=counts(parts["A"].shape[0] for parts in modules if "A" in parts and parts["A"].ndim),
        strengths=counts(_strengths(file, content)), rows=_coverage(file, lora, model), tokens=[],
        readers={name: verdicts.get(name, NOT_READ) for name in PROGRAMS}, problems=problems,
        metadata=dict(content.metadata), writer=written_by(content.metadata, scheme_counts(file)),
        dropped={name: [*one.dropped, *one.wrong] for name, one in readings.items() if one.dropped or one.wrong},
    )  # fmt: skip


def layout(file: SortedFile) -> str:
    """What the file is, in one phrase, such as "LoRA in kohya names"."""
    algorithms = " and ".join(sorted({algorithm_of(parts) for parts in file.parts.values()}))
    return f"{algorithms} in {' and '.join(sorted(scheme_counts(file)))} names"


def folder_readings(file: SortedFile) -> dict[str, tuple[str, str]]:
    """The verdict of every program by the names alone, for a file whose numbers have not been read."""
    known = {"personalize": OURS, "diffusers": (UNKNOWN, "inspect it alone"), "ComfyUI": through_comfyui(file).verdict}
    return {name: known.get(name, NOT_READ) for name in PROGRAMS}


def _problems(file: SortedFile, misfits: list[str]) -> list[str]:
    """Keys of no layer, keys that repeat another, and layers with shapes of no released model."""
    title = FAMILIES[file.family].title
    found = []
    if file.unknown:
        found.append(f"{len(file.unknown)} key(s) belong to no layer of {title}, first {file.unknown[0][:80]!r}")
    if file.twice:
        found.append(f"{len(file.twice)} key(s) repeat another under a second name, first {file.twice[0][:80]!r}")
    if misfits:
        found.append(f"{len(misfits)} layer(s) have shapes of no released model of {title}, first {misfits[0][:100]!r}")
    return found


def _without_effect(lora: TransformerLora) -> list[str]:
    """As a problem: layers whose change is zero, and changes of biases that no LoRA holds."""
    zero = [name for name, (a, b) in lora.pairs.items() if not (bool(a.any()) and bool(b.any()))]
    found = [f"{len(zero)} layer(s) are zero and change nothing, first {zero[0]}: were they trained?"] if zero else []
    left = [f"{len(lora.left)} bias(es) or norm(s) change too, which convert leaves behind"] if lora.left else []
    return found + left


def _strengths(file: SortedFile, content: TensorFile) -> list[float]:
    """alpha / r of every layer that has a rank, as far as it can be computed."""
    try:
        settings = settings_of(content.metadata, "the file")
        ranked = {stem: parts for stem, parts in file.parts.items() if "A" in parts and 0 not in parts["A"].shape[:1]}
        return [scaling(file.layer(stem).layers[0], parts, settings) for stem, parts in ranked.items()
                if parts["A"].ndim]  # fmt: skip
    except UserError:
        return []


def _components(file: SortedFile) -> dict[str, int]:
    """How many layers of each part of the model the file names, by the file's own names."""
    return dict(Counter(file.layer(stem).layers[0].partition(".")[0] for stem in file.parts))


def _coverage(file: SortedFile, lora: TransformerLora | None, model: str | None) -> list[coverage.BlockCoverage]:
    """How many layers of each kind the file changes, by diffusers' names; blocks in a row that agree are one row."""
    layers = models(file.family)
    title = model or max(layers, key=lambda one: len(layers[one].keys() & set(file.names)))
    changed = set(lora.pairs) if lora else set(file.names)
    parts = {name.partition(".")[0] for name in changed} | {"transformer"}
    norms = {name: coverage.norm_of(a, b, 1.0) for name, (a, b) in lora.pairs.items()} if lora else {}
    blocks: dict[str, list[str]] = {}
    for name in layers[title].keys() | changed:
        if name.partition(".")[0] in parts:
            blocks.setdefault(_block(name), []).append(name)
    return _joined([_row(block, blocks[block], changed, norms) for block in sorted(blocks, key=_order)])


def _row(block: str, names: list[str], changed: set[str], norms: Mapping[str, float]) -> coverage.BlockCoverage:
    """The coverage of one block."""
    kinds: dict[str, tuple[int, int]] = {}
    for name in names:
        kind = next((kind for pattern, kind in KINDS if pattern.search(name.partition(".")[2])), "other")
        done, there = kinds.get(kind, (0, 0))
        kinds[kind] = (done + (name in changed), there + 1)
    own = [norms[name] for name in names if name in norms]
    return coverage.BlockCoverage(block, kinds, sum(norm**2 for norm in own) ** 0.5 if own else None)


def _block(name: str) -> str:
    """ "transformer_blocks.3", "text_encoder", or "other" for layers outside the blocks."""
    part, _, path = name.partition(".")
    match = re.match(r"([\w.]+?\.\d+)\.", path) if part == "transformer" else None
    return match[1] if match else "other" if part == "transformer" else part


def _order(block: str) -> tuple[int, str, int]:
    stack, _, number = block.rpartition(".")
    return (1 if stack else 0 if block == "other" else 2), stack, int(number) if stack else 0


def _joined(rows: list[coverage.BlockCoverage]) -> list[coverage.BlockCoverage]:
    """Blocks of one stack that follow one another and have the same counts, as one row with the norm of all."""
    joined: list[coverage.BlockCoverage] = []
    for row in rows:
        stack, _, number = row.block.rpartition(".")
        last = joined[-1] if joined else None
        if stack and last and last.block.rpartition(".")[0] == stack and _single_counts(last) == row.counts:
            first = last.block.rpartition(".")[2].partition("–")[0]
            total = {kind: (c + row.counts[kind][0], n + row.counts[kind][1]) for kind, (c, n) in last.counts.items()}
            norm = ((last.norm or 0) ** 2 + (row.norm or 0) ** 2) ** 0.5 if last.norm or row.norm else None
            joined[-1] = replace(last, block=f"{stack}.{first}–{number}", counts=total, norm=norm)
        else:
            joined.append(row)
    return joined


def _single_counts(row: coverage.BlockCoverage) -> dict[str, tuple[int, int]]:
    """The counts of each of the blocks that a row stands for."""
    first, _, last = row.block.rpartition(".")[2].partition("–")
    blocks = int(last or first) - int(first) + 1
    return {kind: (changed // blocks, there // blocks) for kind, (changed, there) in row.counts.items()}
