"""PEFT folders: `adapter_config.json` beside `adapter_model.safetensors`, one folder for each network."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from personalize.errors import UserError
from personalize.formats import lora_files, verification
from personalize.formats.adapter_folders import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from personalize.formats.lora_keys import COMPONENTS
from personalize.formats.peft_settings import BASE_PREFIX
from personalize.formats.reader_keys import Factors, ReaderKeys
from personalize.formats.verification_report import VerificationReport
from personalize.io.json_files import read_json
from personalize.io.plain_files import is_hidden
from personalize.io.tensor_files import TensorFile, read_tensors, tensor_bytes
from personalize.models.config import FAMILIES


def read_peft_keys(content: TensorFile, family: str | None) -> tuple[Factors, list[str]]:
    """The modules of a file in PEFT's keys; if the family is unknown, as read by the family that knows most of them.

    Any family reads the same ΔW: no block numbers in PEFT's keys differ between families.
    """
    readings = (ReaderKeys(name).peft(content) for name in ([family] if family else FAMILIES))
    return max(readings, key=lambda reading: len(reading[0]))


def peft_files(
    state: Mapping[str, torch.Tensor],
    alpha: float,
    dtype: torch.dtype = torch.float32,
    base: str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> dict[str, bytes]:
    """PEFT's own files of a LoRA, name → bytes, for `PeftModel.from_pretrained(module, folder)`.

    A LoRA of the UNet alone gives `adapter_config.json` and `adapter_model.safetensors`; one that also changes text
    encoders gives a folder of these two files for each part: "unet/", "text_encoder/", "text_encoder_2/".  `base` is
    the name of the base model, `metadata` are strings for the headers, which PEFT passes over.  Only settings that
    every version of PEFT knows are written.  Module paths of the first text encoder have no `text_model.`, because
    transformers ≥ 5.6 builds it without; those of SDXL's second have it.
    """
    modules = lora_files.factor_pairs(state)
    rank, files = lora_files.common_rank(modules), {}
    parts = [part for part in COMPONENTS if any(module.startswith(f"{part}.") for module in modules)]
    for part in parts:
        own = {module.partition(".")[2]: pair for module, pair in modules.items() if module.startswith(f"{part}.")}
        if part == "text_encoder":
            own = {path.removeprefix("text_model."): pair for path, pair in own.items()}
        tensors = {
            f"{BASE_PREFIX}{path}.lora_{side}.weight": tensor.to(dtype)
            for path, pair in own.items()
            for side, tensor in zip("AB", pair, strict=True)
        }
        settings = {"peft_type": "LORA", "task_type": None, "r": rank, "lora_alpha": alpha,
                    "target_modules": list(own), "bias": "none", "inference_mode": True,
                    "base_model_name_or_path": base}  # fmt: skip
        folder = "" if parts == ["unet"] else f"{part}/"
        files[f"{folder}{ADAPTER_CONFIG}"] = (json.dumps(settings, indent=2) + "\n").encode()
        files[f"{folder}{ADAPTER_WEIGHTS}"] = tensor_bytes(tensors, {**(metadata or {}), "format": "pt"})
    return files


def require_no_other_files(folder: Path) -> None:
    """UserError if `folder` holds files other than PEFT's, here or below; hidden ones, such as .DS_Store, may stay."""
    names = {path.name for path in folder.rglob("*") if path.is_file() and not is_hidden(path.name)}
    if others := names - {ADAPTER_CONFIG, ADAPTER_WEIGHTS}:
        raise UserError(f"{folder} already holds {min(others)}: name another output folder")


def require_peft_files(folder: Path, expected: Factors, family: str | None) -> None:
    """UserError unless the files of `peft_files` in `folder` give every ΔW of `expected` (keys: `reader_keys`)."""
    tensors, settings = {}, {}
    folders = {part: folder / part for part in COMPONENTS if (folder / part).is_dir()} or {"unet": folder}
    for part, place in folders.items():
        config, nested = read_json(place / ADAPTER_CONFIG), "text_model." if part == "text_encoder" else ""
        for key, tensor in read_tensors(place / ADAPTER_WEIGHTS).tensors.items():
            tensors[f"{part}.{nested}{key.removeprefix(BASE_PREFIX)}"] = tensor
        settings |= {f"{part}.{key}": config[key] for key in ("r", "lora_alpha", "target_modules")}
    content = TensorFile(tensors, {"lora_adapter_metadata": json.dumps(settings)})
    factors, problems = read_peft_keys(content, family)
    VerificationReport((verification.compare(ADAPTER_WEIGHTS, factors, problems, expected),)).require()
