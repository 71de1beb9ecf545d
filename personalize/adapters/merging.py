"""Sums of LoRAs and LoRAs of lower rank: several become one exactly, or one becomes a smaller one by SVD.

    Σ wᵢ ΔWᵢ = [w₁s₁B₁ … wₙsₙBₙ] [A₁; …; Aₙ]        s = alpha / rank; the rank is the sum of the ranks; exact

A LoRA is in PEFT's names ("<component>.<path>.lora_A.weight" …) with one rank, as `formats.factor_pairs` reads it.
Convolutions count as matrices (out, in·k·k).  Results have alpha = rank, so that alpha / rank is 1: strengths are
multiplied into the factors.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from personalize.adapters.adapter import Adapter
from personalize.errors import Notice, UserError
from personalize.formats.algorithms import algorithm_of
from personalize.formats.foreign_files import AdapterFile, as_lora
from personalize.formats.lora_files import factor_pairs
from personalize.formats.rank_reduction import peft_state, zero_padded
from personalize.formats.timestep_rank import KEY as TIMESTEP_RANK
from personalize.formats.timestep_rank import SummedTimestepRank
from personalize.formats.weight_changes import NEED_THE_BASE
from personalize.io.progress import ticked
from personalize.models.ranges import check_number

State = Mapping[str, Tensor]
OF_CAPTIONS = ("caption_counts", "caption_sizes")  # what `info` says of the captions, in their order
SOURCE = "source embedding"  # what `info["merged_from"]` calls the part that a sum leaves out


@dataclass(frozen=True)
class WeightedLora:
    """One term of a sum of LoRAs: its tensors, its `strength` alpha / rank, and its weight in the sum."""

    state: State
    strength: float
    weight: float = 1.0


def concatenated(parts: Sequence[WeightedLora], *, aligned: bool = False) -> tuple[dict[str, Tensor], int]:
    """The exact sum Σ weight · ΔW of all `parts` as one LoRA, and its rank.

    It has the modules of all parts.  Modules with fewer factors than the common rank are padded with zeros: at the end,
    or with `aligned` in the place of the part that lacks them, so that each part has the same components everywhere.

    Raises:
        UserError: there is no part or no LoRA module in them, a weight is not finite, or a module has two shapes.
    """
    if not parts or not all(math.isfinite(part.weight) for part in parts):
        raise UserError(f"weights of a sum of adapters must be numbers, got {[part.weight for part in parts]}")
    factors_of: dict[str, list[tuple[Tensor, Tensor]]] = {}
    every = [factor_pairs(part.state) for part in parts]
    models = {module: pair for pairs in reversed(every) for module, pair in pairs.items()} if aligned else {}
    for part, pairs in zip(parts, every, strict=True):
        for module, (a, b) in pairs.items():
            factors_of.setdefault(module, []).append((a.float(), b.float() * (part.strength * part.weight)))
        count = max((len(a) for a, _ in pairs.values()), default=0)
        for module in models.keys() - pairs.keys():
            a, b = models[module]
            factors_of.setdefault(module, []).append(zero_padded(a[:0].float(), b[:, :0].float(), count))
    for module, factors in factors_of.items():
        shapes = {(*b.shape[:1], *a.shape[1:]) for a, b in factors}
        if len(shapes) > 1:
            raise UserError(f"module {module} has shapes {sorted(shapes)}: the adapters are of different base models")
    if not factors_of:
        raise UserError("the adapters hold no LoRA module: there is nothing to add up")
    joined = {m: (torch.cat([a for a, _ in f]), torch.cat([b for _, b in f], 1)) for m, f in factors_of.items()}
    rank = max(len(a) for a, _ in joined.values())
    return peft_state({module: zero_padded(a, b, rank) for module, (a, b) in joined.items()}), rank


def plain(adapter: Adapter) -> tuple[Adapter, list[str]]:
    """The adapter with every module as a LoRA, and a line for each kind of change that no LoRA can hold.

    Raises:
        UserError: as `foreign_files.as_lora`.
    """
    family = adapter.known_family
    file = AdapterFile(dict(adapter.lora), adapter.rank, adapter.alpha, family, others=dict(adapter.others))  # pyright: ignore
    file, lines = as_lora(file)
    return replace(adapter, lora=file.state, rank=file.rank, alpha=file.alpha, others={}), lines


def merged(
    adapters: Sequence[Adapter], weights: Sequence[float], names: Sequence[str], *, in_memory: bool = False
) -> Adapter:
    """The exact sum Σ weight · ΔW of several adapters as one adapter, whose rank is the sum of their ranks.

    The learned tokens of all are kept.  Source embeddings are not: each belongs to one picture.  The size is that of
    the first adapter that has one, and the captions are those of all.  `names` are for messages and for the record in
    `info["merged_from"]`, which says in "left_out" whose source embedding is missed.

    in_memory: it is applied, not saved: timestep-dependent ranks may take part, each by its own rule, and if one
        adapter alone has a source embedding, as beside a LoRA for few steps, it is kept with its captions and size.

    Raises:
        UserError: fewer than two adapters, another number of weights, weights out of their range, different families
            or base models, or a token that two of them have learned.
    """
    if len(adapters) < 2 or len(weights) != len(adapters):
        raise UserError(
            f"merging takes two adapters or more and a weight for each, got {len(adapters)}, {len(weights)}"
        )
    for weight in weights:
        check_number("weights", weight)
    for name, adapter in zip(names, adapters, strict=True):
        if adapter.others:
            raise UserError(f"{name} holds changes that no sum of LoRAs can hold: apply it alone, or convert it first")
        if not in_memory:
            require_constant_rank(adapter, name)
    base = _common_base(adapters, names)
    parts = [WeightedLora(a.lora, a.alpha / a.rank, weight) for a, weight in zip(adapters, weights, strict=True)]
    terms = [(part, adapter) for part, adapter in zip(parts, adapters, strict=True) if part.state]
    terms = [(part, adapter) for part, adapter in terms if part.weight] or terms
    masked = any(adapter.timestep_rank for _, adapter in terms)
    state, rank = concatenated([part for part, _ in terms], aligned=masked) if terms else ({}, 1)
    sources: list[dict[str, Any]] = [
        {"name": name, "weight": weight} for name, weight in zip(names, weights, strict=True)
    ]
    with_source = [adapter for adapter in adapters if adapter.source is not None]
    kept = with_source[0] if in_memory and len(with_source) == 1 else None
    for source, adapter in zip(sources, adapters, strict=True):
        source |= {"left_out": [SOURCE]} if adapter is not kept and _lacks_source(adapter) else {}
    speaking = adapters if kept is None else [kept]
    captions = [*dict.fromkeys(caption for adapter in speaking for caption in adapter.captions if caption)]
    info: dict[str, Any] = {"base": base, "merged_from": sources, "caption": captions[0] if captions else ""}
    info |= {"captions": captions} if len(captions) > 1 else {}
    sizes = [adapter.info["size"] for adapter in (*speaking, *adapters) if adapter.info.get("size")]
    info |= {"size": sizes[0]} if sizes else {}
    if kept is not None:
        info |= {key: kept.info[key] for key in OF_CAPTIONS if key in kept.info}
    if masked:
        info[TIMESTEP_RANK] = SummedTimestepRank(tuple((one.timestep_rank, one.rank) for _, one in terms))  # pyright: ignore
    licences = {str(adapter.info["license"]) for adapter in adapters if adapter.info.get("license")}
    info |= {"license": licences.pop() if len(licences) == 1 else "other"} if licences else {}
    pictures = [_pictures(adapter) for adapter in adapters]
    info |= {"pictures": sum(filter(None, pictures))} if all(pictures) else {}
    info["person"] = any(bool(adapter.info.get("person")) for adapter in adapters)
    return Adapter(state, rank, float(rank), kept.source if kept else None, info, _all_concepts(adapters))


def require_constant_rank(adapter: Adapter, name: object) -> None:
    """UserError if the adapter has a timestep-dependent rank, so that it is no single ΔW to add to another."""
    if adapter.timestep_rank is not None:
        raise UserError(
            f"{name} has {adapter.timestep_rank}, which no single sum expresses: first write it for one "
            f"strength at all noise levels with `personalize export lora {name} --timestep_rank share --output FILE`"
        )


def require_scalable(adapter: Adapter, what: str = "a forgetting rule") -> None:
    """UserError if the adapter holds changes of other algorithms than LoRA, which `what` does not scale."""
    if not adapter.others:
        return
    kinds = {algorithm_of(parts) for parts in adapter.others.values()}
    fixed = sorted(kinds & NEED_THE_BASE)
    way = f"no LoRA holds {' and '.join(fixed)}: leave it out" if fixed else "`personalize convert` the file first"
    raise UserError(f"{what} scales LoRAs alone, this file holds {' and '.join(sorted(kinds))} too: {way}")


def require_forgetting(adapter: Adapter) -> None:
    """UserError unless forgetting rules, which select parts of the UNet, scale all that the adapter changes there."""
    require_scalable(adapter)
    if not adapter.changes_unet:
        raise UserError("a forgetting rule selects parts of the UNet, which this adapter does not change: leave it out")


def missed_without(adapter: Adapter, *, tokens: bool = True) -> list[str]:
    """A line for each part of the adapter that is neither in a LoRA file nor in a base model that it is merged into.

    `tokens` says whether learned tokens stay behind as well.
    """
    source = "The source embedding is not exported: without it, the picture is reconstructed less exactly."
    named = "The learned tokens are not exported: `personalize export tokens` writes them."
    return [source] * _needs_source(adapter) + [named] * bool(tokens and adapter.concepts)


def _needs_source(adapter: Adapter) -> bool:
    """True if a part of what was learned is in the adapter's source embedding."""
    return adapter.source is not None and not adapter.info.get("standalone")


def _lacks_source(adapter: Adapter) -> bool:
    """True if a sum lacks the adapter's source embedding, or if the adapter is a sum itself that lacks one."""
    return _needs_source(adapter) or any(part.get("left_out") for part in adapter.info.get("merged_from") or ())


def _pictures(adapter: Adapter) -> int | None:
    """The number of pictures that the adapter was trained on; None if nothing tells it."""
    header = str((adapter.info.get("header") or {}).get("ss_num_train_images", ""))
    known = int(header) if re.fullmatch("[0-9]{1,9}", header) else None
    count = adapter.info.get("pictures", known if {"imported", "merged_from"} & {*adapter.info} else 1)
    return count if isinstance(count, int) else None


def _all_concepts(adapters: Sequence[Adapter]) -> dict[str, Mapping[str, torch.Tensor]]:
    concepts: dict[str, Mapping[str, torch.Tensor]] = {}
    for adapter in adapters:
        if doubled := sorted(set(concepts) & set(adapter.concepts)):
            raise UserError(f"two of the adapters have learned the token {doubled[0]}: export one under another name")
        concepts |= adapter.concepts
    return concepts


def _common_base(adapters: Sequence[Adapter], names: Sequence[str]) -> dict[str, Any]:
    """What is recorded of the base that all adapters share, by the first of them that says which weights it has.

    A Notice says if they were trained with different prediction types.

    Raises:
        UserError: of those that say it, two are of different families, or for different weights.
    """
    families = [(name, one.known_family) for name, one in zip(names, adapters, strict=True) if one.known_family]
    for name, family in families:
        if family != families[0][1]:
            raise UserError(
                f"{name} is for the family {family}, {families[0][0]} for {families[0][1]}: name adapters of one"
            )
    exact = [(name, one.base) for name, one in zip(names, adapters, strict=True) if one.base.get("sha256")]
    for name, base in exact:
        if base["sha256"] != exact[0][1]["sha256"]:
            raise UserError(f"{name} was made for another base model than {exact[0][0]}: merge adapters of one base")
    predicted = {one.base["prediction_type"]: name for name, one in zip(names, adapters, strict=True)
                 if one.base.get("prediction_type")}  # fmt: skip
    if len(predicted) > 1:
        said = ", ".join(f"{name} with {kind}" for kind, name in predicted.items())
        warnings.warn(f"trained with different prediction types, {said}: a base has one", Notice, stacklevel=3)
    named = next((adapter for adapter in adapters if adapter.known_family), adapters[0]).base
    return (exact[0][1] if exact else named) | ({"family": families[0][1]} if families else {})


def low_rank(changes: Mapping[str, Tensor], rank: int) -> tuple[dict[str, Tensor], float]:
    """The LoRA of `rank` (alpha = rank) nearest to weight changes ΔW (by module path), and the relative error.

    ΔW ≈ B A,  B = U √S,  A = √S Vᵀ  of the `rank` largest singular values;   error = ‖ΔW − B A‖ / ‖ΔW‖ over all modules
    """
    state, missed, whole = {}, 0.0, 0.0
    for name, change in ticked(changes.items(), "Decomposing"):
        u, s, v = torch.linalg.svd(change.cpu().double(), full_matrices=False)  # MPS has no float64
        kept = min(rank, len(s))
        a, b = torch.zeros(rank, change.shape[1]), torch.zeros(change.shape[0], rank)
        a[:kept] = (s[:kept, None].sqrt() * v[:kept]).float()
        b[:, :kept] = (u[:, :kept] * s[:kept].sqrt()).float()
        state[f"unet.{name}.lora_A.weight"], state[f"unet.{name}.lora_B.weight"] = a, b
        missed, whole = missed + float(s[kept:].square().sum()), whole + float(s.square().sum())
    return state, (missed / whole) ** 0.5 if whole else 0.0
