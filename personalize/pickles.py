"""Adapter files of older programs: safetensors as always, and pickles only where the user allows it, without code."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from personalize.errors import UserError
from personalize.files import MAX_TENSORS, PICKLE_SUFFIXES, TensorFile, read_tensors

MAX_DEPTH = 8


def is_pickle(path: str | Path) -> bool:
    """Is it a pickle, by its first bytes (a zip archive or pickle's own mark) or, if they tell nothing, by its name?"""
    path = Path(path)
    if not path.is_file():
        return False
    with open(path, "rb") as stream:
        first = stream.read(16)
    if first[8:9] == b"{":  # a safetensors header, whatever the length before it looks like and the file is called
        return False
    return first.startswith((b"PK\x03\x04", b"\x80")) or path.suffix.lower() in PICKLE_SUFFIXES


def read_any(path: str | Path, *, allow_pickle: bool = False) -> TensorFile:
    """The tensors of a safetensors file or, if allowed, of a pickle, whose nested names are joined by dots.

    Raises:
        UserError: missing, damaged, or a pickle that is not allowed or holds anything besides tensors and plain values.
    """
    path = Path(path)
    if not is_pickle(path):
        return read_tensors(path)
    if not allow_pickle:
        raise UserError(
            f"{path} is a pickle, which can run code when opened: get it as .safetensors, or say --allow_pickle to "
            "read nothing but its tensors"
        )
    try:
        _refuse_bombs(path)
        value = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a hostile pickle makes torch raise
        raise UserError(f"{path} is no pickle of plain tensors: {' '.join(str(error).split())[:160]}") from error
    tensors = dict(_flat(value, "", MAX_DEPTH))
    if not tensors:
        raise UserError(f"{path} holds no tensors: is it an adapter?")
    if len(tensors) > MAX_TENSORS:
        raise UserError(f"{path} holds {len(tensors)} tensors, more than any adapter has")
    name = value.get("name") if isinstance(value, dict) else None
    return TensorFile(tensors, {"name": name} if isinstance(name, str) else {})


def _refuse_bombs(path: Path) -> None:
    """torch stores its archives uncompressed: one that unpacks to more than the file's size is made to fill memory."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
                raise UserError("it unpacks to more than its own size")


def _flat(value: Any, prefix: str, depth: int) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        if value.layout == torch.strided and not value.is_quantized:
            yield prefix or "tensor", value.detach().clone()
    elif isinstance(value, dict) and depth:
        for key, inner in value.items():
            yield from _flat(inner, f"{prefix}.{key}" if prefix else str(key), depth - 1)
