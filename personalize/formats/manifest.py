"""`adapter.json`, which says what an adapter folder holds, and the names of the folder's files."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from torch import Tensor

from personalize.errors import UserError
from personalize.formats.adapter_folders import MANIFEST
from personalize.io.atomic import plain_name
from personalize.io.json_files import checked, read_json
from personalize.models.config import FAMILIES


class Manifest(msgspec.Struct, frozen=True):
    """What this program needs of `adapter.json`, with its types and ranges; whatever else is there may be anything."""

    schema: Annotated[int, msgspec.Meta(ge=1)]
    rank: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]
    alpha: Annotated[float, msgspec.Meta(gt=0, le=1e6)]
    base: dict[str, str | None]
    tensors: dict[str, str]
    source_tensors: dict[str, str]
    kohya_file: str = msgspec.field(name="twin", default="")
    files: list[str] = []
    concepts: dict[str, dict[str, str]] = {}
    caption: str | None = ""
    captions: list[str] | None = None
    header: dict[str, str] | None = None
    config: dict[str, Any] | None = None

    @property
    def family(self) -> str:
        """The base model's family as recorded."""
        return str(self.base.get("family"))

    @property
    def scaling(self) -> float:
        """alpha / r."""
        return self.alpha / self.rank


class Listed(msgspec.Struct, frozen=True):
    """The files of an adapter folder alone, of a manifest that may be damaged otherwise."""

    files: list[str] = []


def listed_files(manifest: Path) -> list[str]:
    """The files that `adapter.json` lists; UserError if it is no such manifest."""
    return checked(read_json(manifest), Listed, manifest).files


def is_part_of_adapter(path: Path) -> bool:
    """True if the file's folder is an adapter folder whose manifest lists the file."""
    manifest = path.parent / MANIFEST
    return manifest.is_file() and path.name in listed_files(manifest)


def read_manifest(path: Path) -> Manifest:
    """What `adapter.json` says; UserError if it is damaged, for another family, or names a file elsewhere."""
    manifest = checked(read_json(path), Manifest, path)
    if manifest.family not in FAMILIES:
        raise UserError(f"{path} is for the family {manifest.family[:40]!r}, expected sd1, sd2 or sdxl")
    plain_name(manifest.kohya_file)
    return manifest


def tensor_digest(tensor: Tensor) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of a tensor's dtype, shape and bytes."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode() + data).hexdigest()[:16]
