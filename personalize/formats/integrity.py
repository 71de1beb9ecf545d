"""What can be wrong with the files of an adapter before any ΔW is compared: their bytes, and absurd weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from personalize.formats.adapter_folders import MANIFEST
from personalize.io.atomic import plain_name
from personalize.io.json_files import parse_json, read_json, utf8
from personalize.io.plain_files import file_hash, opened
from personalize.io.tensor_files import TensorFile

LARGEST_WEIGHT = 1e4
HEADER_HASHES = ("sshs_model_hash", "modelspec.hash_sha256")
NO_HASHES = f"{MANIFEST} records no hashes of the files (saved by an earlier version): only weights were compared"
FILE_HASHES, OWN_HASH = "sha256", "manifest_sha256"  # keys of the manifest; see `sealed`


def sealed(values: Mapping[str, Any]) -> bytes:
    """The bytes of `adapter.json`: `values`, and the SHA-256 of all of them, so that a changed manifest shows."""
    values = {key: value for key, value in values.items() if key != OWN_HASH}
    whole = {**values, OWN_HASH: _own_hash(values)}
    return utf8(json.dumps(whole, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _own_hash(values: Mapping[str, Any]) -> str:
    """SHA-256 of the values as JSON, without the entry that holds it; equal after they were written and read."""
    rest = {key: value for key, value in values.items() if key != OWN_HASH}
    return sha256(json.dumps(parse_json(json.dumps(rest), MANIFEST), sort_keys=True).encode()).hexdigest()


def changed_files(folder: Path) -> tuple[list[str], int]:
    """What of an adapter folder is not, byte for byte, what was saved, and the number of files that were compared.

    No file is compared if the manifest is of an earlier version, which recorded no hashes of files.
    """
    manifest = read_json(folder / MANIFEST)
    if FILE_HASHES not in manifest and OWN_HASH not in manifest:
        return [], 0
    hashes = manifest.get(FILE_HASHES)
    if not isinstance(hashes, dict) or not hashes:
        return [f"{MANIFEST} has no hashes of the files: save the adapter again"], 1
    problems = [] if manifest.get(OWN_HASH) == _own_hash(manifest) else [f"{MANIFEST} is not what was saved"]
    for name, expected in hashes.items():
        path = folder / plain_name(name)
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif file_hash(path) != expected:
            problems.append(f"{name} is not what was saved")
    return problems, len(hashes) + 1


def data_hash(path: Path) -> str:
    """SHA-256 of a safetensors file after its header, in hex digits: by it sd-scripts and A1111 know a LoRA."""
    with opened(path) as stream:
        stream.seek(8 + int.from_bytes(stream.read(8), "little"))
        return file_digest(stream, "sha256").hexdigest()  # pyright: ignore[reportArgumentType]


def header_problems(path: Path, content: TensorFile) -> list[str]:
    """What is wrong with the hashes that a LoRA file's own header has of its data, as sd-scripts writes them."""
    said = {name: content.metadata[name] for name in HEADER_HASHES if name in content.metadata}
    data = data_hash(path) if said else ""
    return [
        f"the header's {name} is of other data: the file was changed after it was made"
        for name, value in said.items() if value.removeprefix("0x").lower() != data
    ]  # fmt: skip


def absurd_weight(factors: tuple[Tensor, Tensor, float]) -> str:
    """The weight that no training leaves, if there is one: NaN, infinite, or far above the base's, of about 1."""
    a, b, scaling = factors
    largest = [float(tensor.detach().float().abs().max()) if tensor.numel() else 0.0 for tensor in (a, b)]
    values = [*largest, abs(scaling), largest[0] * largest[1] * abs(scaling)]
    wrong = [value for value in values if not value <= LARGEST_WEIGHT]
    return f"a weight of {wrong[0]:.1e}, which no training leaves" if wrong else ""


def same_numbers(one: Tensor, other: Tensor) -> bool:
    """True if both tensors hold the same numbers; float8, which torch does not compare, as float32."""
    if one.dtype == other.dtype and one.dtype.itemsize == 1:
        one, other = one.float(), other.float()
    return torch.equal(one, other)
