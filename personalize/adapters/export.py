"""Exporting a LoRA: multiply strength and forgetting rules into it, lower its rank, write it in one program's layout.

    layout      what is written                          read by
    kohya       NAME.safetensors                         A1111, Forge, ComfyUI, InvokeAI, kohya's tools, diffusers
    diffusers   pytorch_lora_weights.safetensors         diffusers' `load_lora_weights`
    peft        a folder with adapter_config.json and    PEFT's `PeftModel.from_pretrained(pipe.unet, FOLDER)`
                adapter_model.safetensors, or one such
                folder in it for each part of the model

A file takes its final name only after it has been read back through `reader_keys`, which shares no code with the
writers, and every ΔW was equal to the adapter's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from personalize.adapters import lora, lora_scales
from personalize.adapters.adapter import Adapter
from personalize.adapters.adapter_files import kohya_file_name
from personalize.adapters.forgetting import parse_rules
from personalize.adapters.merging import require_scalable
from personalize.errors import UserError
from personalize.formats import lora_files, timestep_rank, verification
from personalize.formats.peft_files import peft_files, require_peft_files
from personalize.formats.rank_reduction import RankReduction, lowered_pairs
from personalize.formats.reader_keys import Factors, ReaderKeys
from personalize.formats.verification_report import VerificationReport
from personalize.io.atomic import write_file, write_folder
from personalize.io.output_folder import is_tensor_name, require_absent
from personalize.io.tensor_files import read_tensors
from personalize.models.empty import empty_unet
from personalize.models.ranges import check_number

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
LAYOUTS = ("kohya", "diffusers", "peft")
TIMESTEP_RANKS = ("full", "share")


def baked(adapter: Adapter, forget: Sequence[str] = (), strength: float = 1.0) -> Adapter:
    """The adapter with forgetting rules and a strength multiplied into its weights, instead of `lora_scales.scaled`.

    B of each module is multiplied by the fraction that is kept; modules that keep nothing are left out.  Forgetting
    rules select parts of the UNet, so that text encoders get the strength alone.

    Raises:
        UserError: a rule is unknown or selects nothing, the strength is no number, the adapter holds no LoRA, or
            nothing of it would be left.
    """
    check_number("strength", strength)
    if not adapter.lora and not adapter.others:
        raise UserError("the adapter has learned tokens but no LoRA: use `personalize export tokens`")
    rules = parse_rules(forget)
    if rules or strength != 1:
        require_scalable(adapter, "a forgetting rule" if rules else "a strength that is multiplied into the weights")
    unet = {key: tensor for key, tensor in adapter.lora.items() if key.startswith(lora.PREFIX)}
    text = {key: tensor for key, tensor in adapter.lora.items() if key not in unet and strength}
    structure = empty_unet(adapter.family if rules else adapter.known_family or "sd1")
    state = lora_scales.scaled_state(structure, unet, rules, strength)
    state |= {key: tensor * strength if ".lora_B." in key else tensor for key, tensor in text.items()}
    if not state and not adapter.others:
        raise UserError("nothing of the adapter is left: forget less, or use a strength other than 0")
    if not rules and strength == 1:
        return adapter
    return replace(adapter, lora=state, info={**adapter.info, "baked": {"forget": [*forget], "strength": strength}})


def without_timestep_rank(adapter: Adapter, how: str) -> Adapter:
    """The adapter for programs that know no timestep-dependent rank: one ΔW for all timesteps.

    how: "full" leaves every component at full strength, exact at the lowest noise and too strong at the highest;
        "share" multiplies each by the share of timesteps in which it takes part, which of all constant factors is the
        nearest to what was trained.  An adapter without the rule is returned as it is.

    Raises:
        UserError: another `how`.
    """
    if how not in TIMESTEP_RANKS:
        raise UserError(f"unknown timestep_rank {how!r}: choose one of {', '.join(TIMESTEP_RANKS)}")
    rule = adapter.timestep_rank
    if rule is None:
        return adapter
    lora_state = dict(adapter.lora)
    if how == "share":
        shares = torch.tensor(rule.shares()).repeat(adapter.rank // rule.rank)
        for key in (key for key in lora_state if key.startswith(lora.PREFIX) and ".lora_B." in key):
            b = lora_state[key]
            lora_state[key] = b * shares.view(1, -1, *(1,) * (b.ndim - 2))
    header = dict(adapter.info.get("header") or {})
    header.pop(timestep_rank.HEADER_KEY, None)
    info = {key: value for key, value in adapter.info.items() if key != timestep_rank.KEY}
    info |= {"header": header} if "header" in info else {}
    baked = {**(info.get("baked") or {}), timestep_rank.KEY: how}
    return replace(adapter, lora=lora_state, info={**info, "baked": baked})


def timestep_rank_error(adapter: Adapter, how: str) -> float:
    """How far `without_timestep_rank(adapter, how)` is from the adapter in the UNet, relative, over all timesteps.

        √( Σ_t ‖B diag(c − m(t)) A‖² / Σ_t ‖B diag(m(t)) A‖² )        c = 1 ("full"), or the shares ("share")

    0 without a timestep-dependent rank.
    """
    rule = adapter.timestep_rank
    if rule is None:
        return 0.0
    repeats = adapter.rank // rule.rank
    products = torch.zeros(adapter.rank, adapter.rank, dtype=torch.float64)  # ⟨component i, component j⟩, all modules
    for module, (a, b) in lora_files.factor_pairs(adapter.lora).items():
        if module.startswith(lora.PREFIX):
            down, up = a.flatten(1).double(), b.flatten(1).double()
            products += (up.T @ up) * (down @ down.T)
    masks = torch.tensor(rule.masks()[:-1], dtype=torch.float64).repeat(1, repeats)  # (T, R)
    factors = torch.tensor(rule.shares(), dtype=torch.float64).repeat(repeats) if how == "share" else 1.0
    missed, whole = (torch.einsum("ti,ij,tj->", part, products, part) for part in (factors - masks, masks))
    return math.sqrt(max(0.0, float(missed / whole))) if whole else 0.0


def describe_resolved(adapter: Adapter, how: str) -> tuple[Adapter, str]:
    """`without_timestep_rank`, and a sentence on what it costs; the sentence is empty without such a rank."""
    resolved = without_timestep_rank(adapter, how)
    if adapter.timestep_rank is None:
        return resolved, ""
    errors = ", ".join(f"{timestep_rank_error(adapter, name):.1%} with {name}" for name in TIMESTEP_RANKS)
    return resolved, f"It has {adapter.timestep_rank}.  Over all timesteps the weight change differs by {errors}."


def with_lower_rank(adapter: Adapter, rank: int) -> tuple[Adapter, RankReduction]:
    """The nearest adapter of the lower rank `rank`, and the error that this makes.

    Raises:
        UserError: the rank is not lower, or the adapter's timestep-dependent rank is of its present components.
    """
    timestep_rank.require_whole_rank(adapter.timestep_rank)
    reduction = lowered_pairs(lora_files.factor_pairs(adapter.lora), adapter.alpha / adapter.rank, rank)
    return replace(adapter, lora=reduction.state, rank=rank, alpha=float(rank)), reduction


def export_lora(
    adapter: Adapter, output: str | Path, layout: str = "kohya", dtype: torch.dtype = torch.float32
) -> Path:
    """Write the LoRA in one layout and verify it; returns the path of the file, or of the folder for "peft".

    If `output` does not end in ".safetensors" it is a folder, and the file in it gets the name that its readers expect.

    Raises:
        UserError: the file or folder exists already, the disk is full, a number does not fit `dtype`, or the file read
            back does not give the adapter's ΔW.
    """
    if layout not in LAYOUTS:
        raise UserError(f"unknown layout {layout!r}: choose one of {', '.join(LAYOUTS)}")
    output, strength = Path(output), adapter.alpha / adapter.rank
    live = {module: (a, b, strength) for module, (a, b) in lora_files.factor_pairs(adapter.lora).items()}
    if layout == "peft":
        folder, family = require_absent(output), adapter.family
        rule = timestep_rank.rule_header(adapter.info)
        files = peft_files(adapter.lora, adapter.alpha, dtype, adapter.base.get("name"), rule)
        return write_folder(folder, files, check=lambda written: require_peft_files(written, live, family))
    standard = verification.DIFFUSERS_FILE if layout == "diffusers" else kohya_file_name(output.resolve().name)
    file = require_absent(output if is_tensor_name(output) else output / standard)
    content = _content(adapter, file.stem, layout, dtype)
    return write_file(file, content, check=lambda written: _require(written, file.name, live, adapter.family, layout))


def _content(adapter: Adapter, title: str, layout: str, dtype: torch.dtype) -> bytes:
    if layout == "diffusers":
        rule = timestep_rank.rule_header(adapter.info)
        return lora_files.diffusers_file(adapter.lora, adapter.alpha, dtype=dtype, metadata=rule)
    kept = dict(adapter.info.get("header") or {})  # of the file that the adapter was read from
    own = lora_files.kohya_metadata(title=title, family=adapter.family, rank=adapter.rank, info=adapter.info)
    metadata = lora_files.kept_metadata(own, kept, adapter.family, ("ss_output_name", "modelspec.title"))
    if applied := adapter.info.get("baked"):
        metadata["ss_training_comment"] = f"worked in: {json.dumps(applied)}"
    return lora_files.kohya_file(adapter.lora, adapter.alpha, family=adapter.family, dtype=dtype, metadata=metadata)


def _require(path: Path, name: str, live: Factors, family: str, layout: str) -> None:
    names = ReaderKeys(family)
    read = names.kohya if layout == "kohya" else names.peft
    VerificationReport((verification.compare(name, *read(read_tensors(path)), live),)).require()
