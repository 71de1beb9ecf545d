"""Safetensors and JSON files: bytes of tensors to write, and files read without trusting them.

The header of a safetensors file (sizes, shapes, offsets, counts) is checked against the length of the file before any
memory is allocated.  Names in a file become dictionary keys and never paths.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import msgspec
import torch
from torch import Tensor

from personalize.errors import UserError
from personalize.io.json_files import checked, parse_object, utf8
from personalize.io.plain_files import opened

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_TENSORS = 50_000
MAX_DIMENSIONS = 8
PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}
GIT_LFS = b"version https://git-lfs"  # what stands in a file's place where Git has not fetched it
FIRST_BYTES = 64  # of a file, which tell tensors from what a failed download leaves


Position = Annotated[int, msgspec.Meta(ge=0)]


class Entry(msgspec.Struct, frozen=True):
    """What the header of a safetensors file says of one tensor."""

    dtype: str
    shape: Annotated[list[Position], msgspec.Meta(max_length=MAX_DIMENSIONS)]
    data_offsets: tuple[Position, Position]


@dataclass(frozen=True)
class TensorFile:
    """The content of a safetensors file: its tensors by name, and the strings of its header (`__metadata__`)."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def tensor_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """The bytes of a safetensors file; equal tensors and metadata give equal bytes, because names are sorted."""
    return b"".join(tensor_parts(tensors, metadata))


def tensor_parts(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, dtype: torch.dtype | None = None
) -> Iterator[bytes]:
    """The bytes of a safetensors file in parts, the header and then one tensor after the other.

    Floating-point tensors are cast to `dtype` if it is given.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for name in sorted(tensors):
        tensor = tensors[name]
        kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        offsets = [end, end := end + tensor.numel() * kind.itemsize]
        header[name] = {"dtype": names[kind], "shape": list(tensor.shape), "data_offsets": offsets}
    text = utf8(json.dumps(header, separators=(",", ":"), ensure_ascii=False))
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        yield tensor.to("cpu", kind).contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def read_tensors(path: str | Path, peek: int | None = None) -> TensorFile:
    """Read a safetensors file after checking its header against the length of the file.

    Tensors with more than `peek` numbers, if it is given, are not read: they have a shape and lie on the meta device.

    Raises:
        UserError: a file that is missing, a pickle, truncated, or whose header contradicts itself or the file's length.
    """
    path = Path(path)
    with opened(path) as stream:
        header, start = _read_header(stream, path)
        size = os.fstat(stream.fileno()).st_size - start
        stated = header.pop("__metadata__", None)
        metadata = {} if stated is None else checked(stated, dict[str, str], f"{path}: its __metadata__")
        entries = {name: _checked_entry(name, value, size, path) for name, value in header.items()}
        _check_ranges(entries, size, path)
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as view:
            tensors = {
                name: torch.empty(entry[1], dtype=entry[0], device="meta")
                if peek is not None and math.prod(entry[1]) > peek
                else _read_tensor(view, start, *entry)
                for name, entry in entries.items()
            }
    return TensorFile(tensors, metadata)


def _read_header(stream: BinaryIO, path: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file as a dictionary, and the position at which the tensors' data start."""
    first = stream.read(FIRST_BYTES)
    if wrong := no_tensors(first):
        raise UserError(f"{path} {wrong}")
    prefix, file_size = first[:8], os.fstat(stream.fileno()).st_size
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, file_size - 8):
        if path.suffix.lower() in PICKLE_SUFFIXES or prefix.startswith((b"PK\x03\x04", b"\x80")):
            raise UserError(f"{path} is a pickle, which can run code when opened: convert it to .safetensors first")
        raise UserError(f"{path} is no safetensors file or is truncated ({file_size} bytes): use a .safetensors file")
    stream.seek(8)
    header = parse_object(stream.read(length), path)
    if len(header) > MAX_TENSORS:
        raise UserError(f"{path} names {len(header)} tensors, more than the {MAX_TENSORS} any model of this kind has")
    return header, 8 + length


def no_tensors(first: bytes) -> str:
    """What is wrong with a file that a failed download left, by its `first` bytes; "" if it may hold tensors."""
    if not first:
        return "is empty: get it again"
    if first.startswith(GIT_LFS):
        return "is a pointer of Git LFS, the file itself is missing: run `git lfs pull` in its folder, or get it again"
    if len(first) >= 8 and all(32 <= byte < 127 or byte in b"\t\r\n" for byte in first[:16]):
        words = " ".join(first.decode("ascii", "replace").split())[:40]
        return f"is a text that begins {words!r}, not tensors: its download failed, get it again"
    return ""


def _checked_entry(name: str, value: Any, size: int, path: Path) -> tuple[torch.dtype, list[int], int, int]:
    """One tensor's dtype, shape, begin and end; UserError unless they are consistent and within `size` bytes."""
    if isinstance(value, dict) and isinstance(kind := value.get("dtype"), str) and kind not in DTYPES:
        raise UserError(f"{path}: tensor {name[:120]!r} is of the type {kind[:40]!r}, which is not read: convert it")
    try:
        entry = msgspec.convert(value, Entry)
        dtype, (begin, end) = DTYPES[entry.dtype], entry.data_offsets
        if begin <= end and end > size:
            raise UserError(f"{path} is cut short: it has {size} bytes of data, tensor {name[:120]!r} ends at {end}")
        fits = math.prod(max(1, side) for side in entry.shape) < 2**40  # bounds the strides of empty tensors
        if fits and begin <= end <= size and end - begin == math.prod(entry.shape) * dtype.itemsize:
            return dtype, entry.shape, begin, end
    except (msgspec.ValidationError, KeyError, OverflowError):
        pass
    raise UserError(f"{path} is damaged: the entry of tensor {name[:120]!r} does not fit its {size} bytes of data")


def _check_ranges(entries: Mapping[str, tuple[torch.dtype, list[int], int, int]], size: int, path: Path) -> None:
    """UserError unless every byte of the data belongs to exactly one tensor."""
    position = 0
    for _, _, begin, end in sorted(entries.values(), key=lambda entry: entry[2:]):
        if begin != position:
            raise UserError(f"{path} is damaged: its tensors overlap or leave a gap at byte {position}")
        position = end
    if position != size:
        raise UserError(f"{path} is damaged: {size - position} bytes belong to no tensor")


def _read_tensor(view: mmap.mmap, start: int, dtype: torch.dtype, shape: list[int], begin: int, end: int) -> Tensor:
    """One tensor, copied out of the file's data, which begin at byte `start`."""
    if begin == end:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(view[start + begin : start + end]), dtype=dtype).reshape(shape)
