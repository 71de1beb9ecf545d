"""Read adapter files that may be pickles, as older programs wrote them: only if allowed, and without running code."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from personalize.errors import UserError
from personalize.io.tensor_files import MAX_TENSORS, PICKLE_SUFFIXES, TensorFile, read_tensors

MAX_DEPTH = 8  # of dictionaries in dictionaries


def is_pickle(path: str | Path) -> bool:
    """True if the file is a pickle by its first bytes (a zip archive, or protocol 2 and later), or else by its name."""
    path = Path(path)
    if not path.is_file():
        return False
    with open(path, "rb") as stream:
        first = stream.read(16)
    if first[8:9] == b"{":  # a safetensors header, whatever the length before it looks like and the file is called
        return False
    return first.startswith((b"PK\x03\x04", b"\x80")) or path.suffix.lower() in PICKLE_SUFFIXES


def read_any(path: str | Path, *, allow_pickle: bool = False, peek: int | None = None) -> TensorFile:
    """Read the tensors of a safetensors file or, with `allow_pickle`, of a pickle.

    A pickle's nested dictionaries are flattened: the keys on the way to a tensor are joined by dots.  If the outermost
    dictionary has a "name", as A1111's embeddings do, it becomes the metadata's "name".

    Raises:
        UserError: a file that is missing or damaged, a pickle without `allow_pickle`, or one that holds anything but
            tensors and plain values.
    """
    path = Path(path)
    if not is_pickle(path):
        return read_tensors(path, peek)
    if not allow_pickle:
        raise UserError(
            f"{path} is a pickle, which can run code when opened: get it as .safetensors, or say --allow_pickle to "
            "read nothing but its tensors"
        )
    try:
        _check_unpacked_size(path)
        with torch.serialization.safe_globals([nn.ParameterDict]):  # as the original textual inversion saved its rows
            value = torch.load(path, map_location="cpu", weights_only=True)
        tensors = dict(_flat(value, "", MAX_DEPTH))
    except Exception as error:  # a hostile pickle can make torch raise anything
        raise UserError(f"{path} is no pickle of plain tensors: {' '.join(str(error).split())[:160]}") from error
    if not tensors:
        raise UserError(f"{path} holds no tensors: is it an adapter?")
    if len(tensors) > MAX_TENSORS:
        raise UserError(f"{path} holds {len(tensors)} tensors, more than any adapter has: is it a checkpoint?")
    name = value.get("name") if isinstance(value, dict) else None
    return TensorFile(tensors, {"name": name} if isinstance(name, str) else {})


def _check_unpacked_size(path: Path) -> None:
    """UserError if a zip archive unpacks to more than its own size, which torch's uncompressed archives never do.

    Such a file is made to fill the memory.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
                raise UserError("it unpacks to more than its own size")


def _flat(value: Any, prefix: str, depth: int) -> Iterator[tuple[str, Tensor]]:
    """Every dense tensor in nested dictionaries of at most `depth` levels, by its keys joined with dots."""
    if isinstance(value, Tensor):
        if value.layout == torch.strided and not value.is_quantized:
            yield prefix or "tensor", value.detach().clone()
    elif isinstance(value, dict | nn.ParameterDict) and depth:
        for key, inner in value.items():
            yield from _flat(inner, f"{prefix}.{key}" if prefix else str(key), depth - 1)
