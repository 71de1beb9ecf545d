"""`adapter.json`, which says what an adapter folder holds, and the names of the folder's files."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from personalize.errors import UserError
from personalize.io.atomic import plain_name
from personalize.io.tensor_files import read_json

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"  # the file name that diffusers looks for in a folder


SOURCE_FILE = "source_embedding.safetensors"


MANIFEST = "adapter.json"


FAMILIES = ("sd1", "sd2", "sdxl")


def is_part_of_adapter(path: Path) -> bool:
    """True if the file's folder is an adapter folder whose manifest lists the file."""
    manifest = path.parent / MANIFEST
    return manifest.is_file() and path.name in (read_json(manifest).get("files") or [])


def read_manifest(path: Path) -> tuple[str, str, float, dict[str, str], dict[str, str], dict[str, dict[str, str]]]:
    """Family, name of the kohya file, alpha / r, and hashes of the LoRA, the source embedding and every token."""
    manifest = read_json(path)
    try:
        family, kohya_file = str(manifest["base"]["family"]), str(manifest["twin"])
        scaling = float(manifest["alpha"]) / int(manifest["rank"])
        hashes, source = dict(manifest["tensors"]), dict(manifest["source_tensors"])
        concepts = {str(token): dict(rows) for token, rows in dict(manifest.get("concepts", {})).items()}
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{path} is damaged or no adapter's ({error!r}): save the adapter again") from error
    if family not in FAMILIES:
        raise UserError(f"{path} is for the family {family[:40]!r}, expected sd1, sd2 or sdxl")
    return family, plain_name(kohya_file), scaling, hashes, source, concepts


def tensor_digest(tensor: Tensor) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of a tensor's dtype, shape and bytes."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode() + data).hexdigest()[:16]
