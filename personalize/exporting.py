"""Exporting a LoRA: read any, work strength, forgetting and a lower rank into it, write it for one kind of reader.

    layout      what is written                          read by
    kohya       NAME.safetensors                         A1111, Forge, ComfyUI, InvokeAI, kohya's tools, diffusers
    diffusers   pytorch_lora_weights.safetensors         diffusers' `load_lora_weights`
    peft        a folder with adapter_config.json and    peft's `PeftModel.from_pretrained(pipe.unet, FOLDER)`
                adapter_model.safetensors, or one such
                folder in it for each part of the model

Nothing takes its final name before it has been read back through `reader_names`, which shares nothing with the code
that wrote it, and every ΔW was found right.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from personalize import formats, lora, verify
from personalize.adapter import Adapter, kohya_file_name
from personalize.errors import UserError
from personalize.files import TensorFile, read_json, read_tensors, tensor_bytes, write_file, write_folder
from personalize.forgetting import parse_rule
from personalize.lora_names import COMPONENTS
from personalize.merging import RankReduction, WeightedLora, concatenated, reduced
from personalize.reader_names import Factors, ReaderKeys, empty_unet

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
LAYOUTS = ("kohya", "diffusers", "peft")
PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
KEPT_HEADERS = ("ss_", "modelspec.")


def read_adapter(path: str | Path) -> Adapter:
    """An adapter folder, or a LoRA file of any layout as an adapter without source embedding.

    Raises:
        UserError: neither of the two, or damaged.
    """
    path = Path(path)
    if path.is_dir():
        return Adapter.load(path)
    if not path.exists():
        raise UserError(f"there is no adapter at {path}: name an adapter folder or a LoRA file")
    content = formats.read_lora(path)
    header = {key: value for key, value in content.metadata.items() if key.startswith(KEPT_HEADERS)}
    base: dict[str, Any] = {"family": content.family, "name": header.get("ss_sd_model_name")}
    if content.family == "sd2" and header.get("ss_base_model_version", "").endswith("_v"):
        base["prediction_type"] = "v_prediction"
    info = {"base": {key: value for key, value in base.items() if value}, "header": header}
    return Adapter(content.state, content.rank, content.alpha, None, info)


def baked(adapter: Adapter, forget: Sequence[str] = (), strength: float = 1.0) -> Adapter:
    """The adapter with forgetting rules and a strength worked in, as `lora.scaled` would apply them while running.

    A module that keeps nothing is dropped, of the others B is multiplied; the text encoders know no sides, they take
    the strength alone.

    Raises:
        UserError: an unknown rule, one that selects nothing, a strength that is no number, or nothing is left.
    """
    if not math.isfinite(strength):
        raise UserError(f"the strength must be a number, got {strength}")
    rules = [parse_rule(text) for text in forget if text != "none"]
    unet = {key: tensor for key, tensor in adapter.lora.items() if key.startswith(lora.PREFIX)}
    text = {key: tensor for key, tensor in adapter.lora.items() if key not in unet and strength}
    state = lora.baked(empty_unet(adapter.family), unet, rules, strength)
    state |= {key: tensor * strength if ".lora_B." in key else tensor for key, tensor in text.items()}
    if not state:
        raise UserError("nothing of the adapter is left: forget less, or use a strength other than 0")
    if not rules and strength == 1:
        return adapter
    return replace(adapter, lora=state, info={**adapter.info, "baked": {"forget": [*forget], "strength": strength}})


def with_lower_rank(adapter: Adapter, rank: int) -> tuple[Adapter, RankReduction]:
    """The nearest adapter of `rank`, and what that cost; a `rank` that is not lower is an error."""
    if rank >= adapter.rank:
        raise UserError(f"the adapter has rank {adapter.rank}: --rank must be lower, got {rank}")
    found = reduced(adapter.lora, adapter.alpha / adapter.rank, rank)
    return replace(adapter, lora=found.state, rank=rank, alpha=float(rank)), found


def merged(adapters: Sequence[Adapter], weights: Sequence[float], names: Sequence[str]) -> Adapter:
    """Σ weight · ΔW as one adapter, exactly: ranks add up. Source embeddings belong to one picture and stay behind.

    Raises:
        UserError: fewer than two, another number of weights, different families or base models, one token in two.
    """
    if len(adapters) < 2 or len(weights) != len(adapters):
        raise UserError(
            f"merging takes two adapters or more and a weight for each, got {len(adapters)}, {len(weights)}"
        )
    first = adapters[0]
    for name, adapter in zip(names, adapters, strict=True):
        if adapter.family != first.family:
            raise UserError(
                f"{name} is for the family {adapter.family}, {names[0]} for {first.family}: they do not add"
            )
        if (adapter.base.get("sha256") or "") != (first.base.get("sha256") or "") and _both_known(adapter, first):
            raise UserError(f"{name} was made for another base model than {names[0]}: merge adapters of one base")
    parts = [WeightedLora(a.lora, a.alpha / a.rank, weight) for a, weight in zip(adapters, weights, strict=True)]
    state, rank = concatenated([part for part in parts if part.weight] or parts)
    told = [{"name": name, "weight": weight} for name, weight in zip(names, weights, strict=True)]
    captions = dict.fromkeys(str(adapter.info.get("caption") or "") for adapter in adapters)
    info = {"base": first.base | {"family": first.family}, "merged_from": told}
    info["caption"] = ", ".join(caption for caption in captions if caption)
    info["person"] = any(bool(adapter.info.get("person")) for adapter in adapters)
    return Adapter(state, rank, float(rank), None, info, _all_concepts(adapters))


def _all_concepts(adapters: Sequence[Adapter]) -> dict[str, Mapping[str, torch.Tensor]]:
    found: dict[str, Mapping[str, torch.Tensor]] = {}
    for adapter in adapters:
        if doubled := sorted(set(found) & set(adapter.concepts)):
            raise UserError(f"two of the adapters have learned the token {doubled[0]}: export one under another name")
        found |= adapter.concepts
    return found


def _both_known(*adapters: Adapter) -> bool:
    return all(adapter.base.get("sha256") for adapter in adapters)


def export_lora(
    adapter: Adapter, output: str | Path, layout: str = "kohya", dtype: torch.dtype = torch.float32
) -> Path:
    """Write the LoRA in one layout, verified; returns the file (for peft, the folder).

    An `output` that does not end in ".safetensors" is a folder, in which the file gets the name its readers look for.

    Raises:
        UserError: something is there already, the disk is full, numbers do not fit `dtype`, or it does not verify.
    """
    if layout not in LAYOUTS:
        raise UserError(f"unknown layout {layout!r}: choose one of {', '.join(LAYOUTS)}")
    output, strength = Path(output), adapter.alpha / adapter.rank
    live = {module: (a, b, strength) for module, (a, b) in formats.factor_pairs(adapter.lora).items()}
    if layout == "peft":
        folder = absent(output)
        files = peft_files(adapter, dtype)
        return write_folder(folder, files, check=lambda written: _require_peft(written, live, adapter.family))
    standard = verify.DIFFUSERS_FILE if layout == "diffusers" else kohya_file_name(output.resolve().name)
    file = absent(output if output.suffix == ".safetensors" else output / standard)
    content = _content(adapter, file.stem, layout, dtype)
    return write_file(file, content, check=lambda written: _require(written, file.name, live, adapter.family, layout))


def absent(path: Path) -> Path:
    """`path` itself if nothing is there yet, so that no export can destroy what it was made from."""
    if path.exists() or path.is_symlink():
        raise UserError(f"{path} exists already: name another output, or remove it first")
    return path


def _content(adapter: Adapter, title: str, layout: str, dtype: torch.dtype) -> bytes:
    if layout == "diffusers":
        return formats.diffusers_file(adapter.lora, adapter.alpha, dtype=dtype)
    header = dict(adapter.info.get("header") or {})
    own = formats.kohya_metadata(title=title, family=adapter.family, rank=adapter.rank, info=adapter.info)
    told = {"ss_network_dim", "ss_network_alpha", "ss_network_module", "ss_output_name", "modelspec.title"}
    metadata = own | header | {key: own[key] for key in told}
    if worked_in := adapter.info.get("baked"):
        metadata["ss_training_comment"] = f"worked in: {json.dumps(worked_in)}"
    return formats.kohya_file(adapter.lora, adapter.alpha, family=adapter.family, dtype=dtype, metadata=metadata)


def _require(path: Path, name: str, live: Factors, family: str, layout: str) -> None:
    names = ReaderKeys(family)
    read = names.kohya if layout == "kohya" else names.peft
    verify.VerificationReport((verify.compare(name, *read(read_tensors(path)), live),)).require()


def peft_files(adapter: Adapter, dtype: torch.dtype = torch.float32) -> dict[str, bytes]:
    """peft's own files for an adapter of the UNet; if it has text encoders too, below "unet/", "text_encoder/", ….

    Only settings that every peft knows. The first text encoder is named without `text_model.`, as transformers ≥ 5.6
    builds it; that of SDXL's second with it.
    """
    files, modules = {}, formats.factor_pairs(adapter.lora)
    parts = [part for part in COMPONENTS if any(module.startswith(f"{part}.") for module in modules)]
    for part in parts:
        own = {module.partition(".")[2]: pair for module, pair in modules.items() if module.startswith(f"{part}.")}
        if part == "text_encoder":
            own = {path.removeprefix("text_model."): pair for path, pair in own.items()}
        tensors = {
            f"base_model.model.{path}.lora_{side}.weight": tensor.to(dtype)
            for path, pair in own.items()
            for side, tensor in zip("AB", pair, strict=True)
        }
        settings = {"peft_type": "LORA", "task_type": None, "r": adapter.rank, "lora_alpha": adapter.alpha,
                    "target_modules": list(own), "bias": "none", "inference_mode": True,
                    "base_model_name_or_path": adapter.base.get("name")}  # fmt: skip
        place = "" if parts == ["unet"] else f"{part}/"
        files[f"{place}{PEFT_CONFIG}"] = (json.dumps(settings, indent=2) + "\n").encode()
        files[f"{place}{PEFT_WEIGHTS}"] = tensor_bytes(tensors, {"format": "pt"})
    return files


def _require_peft(folder: Path, live: Factors, family: str) -> None:
    """Every part read back as one file in PEFT names, with the config in the place of diffusers' metadata."""
    tensors, settings = {}, {}
    places = {part: folder / part for part in COMPONENTS if (folder / part).is_dir()} or {"unet": folder}
    for part, place in places.items():
        config, nested = read_json(place / PEFT_CONFIG), "text_model." if part == "text_encoder" else ""
        for key, tensor in read_tensors(place / PEFT_WEIGHTS).tensors.items():
            tensors[f"{part}.{nested}{key.removeprefix('base_model.model.')}"] = tensor
        settings |= {f"{part}.{key}": config[key] for key in ("r", "lora_alpha", "target_modules")}
    content = TensorFile(tensors, {"lora_adapter_metadata": json.dumps(settings)})
    verify.VerificationReport((verify.compare(PEFT_WEIGHTS, *ReaderKeys(family).peft(content), live),)).require()
