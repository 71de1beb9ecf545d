"""Read what an adapter file of any program holds: LoRA matrices, learned tokens, and changes of other algorithms.

`AdapterFile` is the one list of a file's contents: whatever inspects, converts, exports, merges or applies a file reads
it here, so that they all take the same files.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from personalize.errors import Notice, UserError
from personalize.formats import layouts
from personalize.formats import textual_inversion_files as token_files
from personalize.formats.adapter_folders import ADAPTER_CONFIG
from personalize.formats.adapter_source import open_adapter
from personalize.formats.algorithms import algorithm_of, missing_factors, require_no_new_weight
from personalize.formats.diffusion_transformers.families import FAMILIES as TRANSFORMER_FAMILIES
from personalize.formats.diffusion_transformers.reading import identify
from personalize.formats.layer_kinds import as_layer_wants, fitting_families, kernels
from personalize.formats.layer_sizes import SMALL, most_numbers, require_fitting
from personalize.formats.lora_files import factor_pairs
from personalize.formats.peft_settings import scaling, settings_of, strength
from personalize.formats.rank_reduction import peft_state, zero_padded
from personalize.formats.timestep_rank import with_rule
from personalize.formats.weight_changes import NEED_THE_BASE, NOT_A_MATRIX, Parts, lora_pair, require_small
from personalize.io.tensor_files import TensorFile

PLAIN = {"LoRA", "Tucker LoCon"}
MAX_PADDING = 16  # times the numbers of a LoRA, to give all its modules one rank


@dataclass(frozen=True)
class AdapterFile:
    """What an adapter file holds.

    state, rank, alpha: the LoRA in PEFT's names, "<component>.<path>.lora_A.weight", with one rank and one alpha.
    concepts: learned tokens, by token the rows (n, d) of each text encoder.
    others: modules of other algorithms (LoHa, LoKr, DoRA, changed biases, …), their tensors by role, where "scale" is
        the factor s of `weight_changes`.
    family: "sd1", "sd2", "sdxl", or None if the file does not tell.
    layout: "kohya" or "peft", by whose names most keys have.
    """

    state: dict[str, Tensor]
    rank: int
    alpha: float
    family: str | None
    layout: str = "peft"
    metadata: dict[str, str] = field(default_factory=dict)
    concepts: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    others: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    @property
    def header(self) -> dict[str, str]:
        """The metadata that graphical programs show and that do not depend on the layout: `ss_*` and `modelspec.*`."""
        return {key: value for key, value in self.metadata.items() if key.startswith(("ss_", "modelspec."))}

    @property
    def base(self) -> dict[str, str]:
        """What the file says about its base model: `family`, `name` and `prediction_type`, as far as it says them."""
        velocity = self.header.get("ss_base_model_version", "").endswith("_v")  # sd_v2_v, and sd_v1_v of some SD 1.x
        velocity |= self.header.get("modelspec.prediction_type") == "v"
        velocity |= self.header.get("modelspec.architecture", "").partition("/")[0].endswith("-v")  # …-v2-768-v
        base = {"family": self.family, "name": self.header.get("ss_sd_model_name")}
        base["prediction_type"] = "v_prediction" if velocity else None
        return {key: value for key, value in base.items() if value}


def read_adapter_file(
    path: str | Path, content: TensorFile | None = None, *, token: str | None = None, family: str | None = None
) -> AdapterFile:
    """Read a LoRA, learned tokens, or both, in any naming scheme, or in several at once.

    Where alphas or ranks differ between modules, alpha / r is multiplied into B and smaller ranks are padded with
    zeros, which leaves every ΔW as it was.  The Tucker core of a convolution (`lora_mid`) is multiplied into A, which
    is exact too.  Every factor gets the number of dimensions that its layer has.

    Args:
        path: the file or folder, also for messages and for tokens that the file does not name.
        content: what has already been read from `path`.
        token: the word of a learned token, in place of the file's own, if there is one token.
        family: the family of the base model, in place of what the file tells.

    Raises:
        UserError: it cannot be read, holds nothing of an adapter, or more than that.

    A Notice says if it is a file of PEFT's without the settings that hold its alpha.
    """
    content = open_adapter(path) if content is None else content
    metadata = with_rule(path, content.metadata)
    contents = layouts.classify_tensors(content.tensors)
    concepts = token_files.read_concepts(path, content, token) if contents.embeddings else {}
    family = family or layouts.detect_family(contents, content.metadata)[0]
    if contents.embeddings and not contents.modules:
        return AdapterFile({}, 1, 1.0, family or _family_of_rows(concepts), "peft", metadata, concepts)
    if contents.unknown_keys and (found := identify(content)) is not None:
        title = TRANSFORMER_FAMILIES[found[0]].title
        raise UserError(
            f"{path} is a LoRA for {title}: inspect, convert and verify take it, all else knows SD 1, 2 and XL alone"
        )
    require_adapter(contents, path)
    require_fitting(path, contents.modules, family)
    parts = {module: _with_folded_core(module, values, family) for module, values in contents.modules.items()}
    plain = {module for module in parts if contents.algorithms[module] <= PLAIN}
    shaped = {module: as_layer_wants(parts[module], module, family) if module in plain else {} for module in parts}
    pairs = {f"{m}.lora_{s}.weight": shaped[m][s].float() for m in plain for s in "AB" if s in shaped[m]}
    modules, settings = factor_pairs(pairs), settings_of(content.metadata, path)
    if contents.naming_schemes["PEFT folder"] and not settings:
        warnings.warn(
            f"{path} is a file of PEFT's, whose alpha stands in {ADAPTER_CONFIG}, which is not beside it: alpha is "
            "taken for the rank, right only if it was trained so",
            Notice,
            stacklevel=2,
        )
    scalings = {module: scaling(module, parts[module], settings) for module in modules}
    state, rank, alpha = _with_one_rank_and_alpha(modules, scalings) if modules else ({}, 1, 1.0)
    others = {}
    for module in sorted(parts.keys() - modules.keys()):
        _require_complete(module, parts[module])
        scale = torch.tensor(strength(module, parts[module], settings), dtype=torch.float64)
        others[module] = {role: tensor.float() for role, tensor in parts[module].items()} | {"scale": scale}
    layout = "kohya" if contents.naming_schemes["kohya"] else "peft"
    return AdapterFile(state, rank, alpha, family, layout, metadata, concepts, others)


def _family_of_rows(concepts: Mapping[str, Mapping[str, Tensor]]) -> str | None:
    return next((family for rows in concepts.values() if (family := token_files.family_of(rows))), None)


def require_adapter(contents: layouts.FileContents, path: str | Path) -> None:
    """UserError, which says what the file is, unless all of it belongs to an adapter of a family that we know."""
    if contents.file_kind.startswith("textual inversion"):
        return
    if contents.file_kind and contents.file_kind != "bundle":
        raise UserError(f"{path} is no adapter: it is a {contents.file_kind}; `personalize inspect` says more")
    if custom := contents.algorithm_counts["Custom Diffusion"]:
        raise UserError(f"{path} is no LoRA: it holds {custom} module(s) of Custom Diffusion, which replace weights "
                        "and need their own pipeline")  # fmt: skip
    if contents.modules and not fitting_families(contents.modules):
        first = next(iter(contents.key_stems.values()))[:120]
        raise UserError(f"{path}: none of its modules, first {first!r}, is in a model of SD 1, 2 or XL")
    if contents.unknown_keys:
        key = contents.unknown_keys[0][:120]
        raise UserError(f"{path}: {key!r} belongs to no known part of an adapter; `personalize inspect` lists them")
    if contents.duplicate_keys:
        raise UserError(f"{path} gives the same factor of a module twice, once as {contents.duplicate_keys[0][:120]!r}")
    if not contents.modules:
        raise UserError(f"{path} holds no tensors of an adapter: name a file with LoRA weights or learned tokens")


def as_lora(file: AdapterFile, rank: int | None = None) -> tuple[AdapterFile, list[str]]:
    """The file with every module as a LoRA, exactly, and a line for each kind of change that no LoRA can hold.

    Raises:
        UserError: modules whose change depends on the base's weights, or nothing that a LoRA could hold.
    """
    if not file.others:
        return file, []
    needing = [module for module, parts in file.others.items() if algorithm_of(parts) in NEED_THE_BASE]
    if needing:
        names = sorted({algorithm_of(file.others[module]) for module in needing})
        raise UserError(
            f"{len(needing)} module(s) of {' and '.join(names)} change the base's own weights, which no LoRA can say: "
            "merge the file into its base with `personalize export checkpoint`"
        )
    sides, pairs, left = kernels(file.family), factor_pairs(file.state), []
    pairs = {module: (a, b * (file.alpha / file.rank)) for module, (a, b) in pairs.items()}
    for module, parts in file.others.items():
        if algorithm_of(parts) in NOT_A_MATRIX:
            left.append(module)
            continue
        kernel = sides.get(module, tuple(parts["diff"].shape[2:]) if "diff" in parts else ())
        pair = dict(zip("AB", lora_pair(module, parts, kernel, most_numbers(module, file.family)), strict=True))
        pair = as_layer_wants(pair, module, file.family)
        pairs[module] = (pair["A"], pair["B"] * float(parts["scale"]))
        left += [module] if {"diff_b", "lora_B.bias"} & set(parts) else []
    if not pairs:
        raise UserError("the file changes biases and norms alone, which no LoRA can hold: use `export checkpoint`")
    state, rank, alpha = _with_one_rank_and_alpha(pairs, dict.fromkeys(pairs, 1.0))
    behind = (
        f"{len(left)} changed bias(es) or norm(s) stay behind, first of {left[0] if left else ''}: no LoRA holds them"
    )
    lines = [f"{behind}; `personalize export checkpoint` merges them"] if left else []
    return replace(file, state=state, rank=rank, alpha=alpha, others={}), lines


def _require_complete(module: str, parts: Parts) -> None:
    """UserError unless a module of another algorithm than LoRA has all its factors, of finite numbers, and no more."""
    require_no_new_weight(f"module {module}", parts)
    if missing := missing_factors(parts):
        raise UserError(f"module {module} of {algorithm_of(parts)} lacks {' and '.join(missing)}: get the file again")
    if odd := [role for role, tensor in parts.items() if not bool(tensor.float().isfinite().all())]:
        raise UserError(f"module {module} holds a number that is not finite (in {odd[0]}): train the adapter again")


def _with_folded_core(module: str, parts: Mapping[str, Tensor], family: str | None = None) -> Mapping[str, Tensor]:
    """The tensors of a module with a Tucker core multiplied into A; without a core they are returned unchanged.

    A (r, i, k, k) = Σ_s mid (r, s, k, k) · down (s, i)
    """
    if "mid" not in parts:
        return parts
    mid, down = parts["mid"].float(), parts.get("A", torch.empty(0)).float()
    if mid.ndim != 4 or down.ndim != 4 or down.shape[2:].numel() != 1 or mid.shape[1] != down.shape[0]:
        raise UserError(f"module {module}: lora_mid {tuple(mid.shape)} and lora_down {tuple(down.shape)} do not fit")
    require_small(mid[:, 0].numel() * down.shape[1], most_numbers(module, family))
    folded = torch.einsum("rskl,si->rikl", mid, down.flatten(1))
    return {**{role: tensor for role, tensor in parts.items() if role != "mid"}, "A": folded}


def _with_one_rank_and_alpha(
    modules: Mapping[str, tuple[Tensor, Tensor]], scalings: Mapping[str, float]
) -> tuple[dict[str, Tensor], int, float]:
    """State, rank and alpha of a LoRA whose modules may have ranks and scalings alpha / r of their own.

    Smaller ranks are padded with zeros; scalings, where they differ, are multiplied into B, and alpha is the rank.
    """
    rank = max(down.shape[0] for down, _ in modules.values())
    held = sum(down.numel() + up.numel() for down, up in modules.values())
    padded = rank * sum(down[0].numel() + up[:, 0].numel() for down, up in modules.values())
    if padded > MAX_PADDING * held + SMALL:
        least = min(modules, key=lambda module: modules[module][0].shape[0])
        raise UserError(
            f"module {least} has rank {modules[least][0].shape[0]}, another has {rank}: one rank for all would take "
            f"{padded:,} numbers in place of {held:,}; resize the file to ranks that are closer"
        )
    same = len(set(scalings.values())) == 1
    pairs = {
        module: zero_padded(down, up if same else up * scalings[module], rank) for module, (down, up) in modules.items()
    }
    return peft_state(pairs), rank, rank * next(iter(scalings.values())) if same else float(rank)
