"""Files: writing that is whole or absent, and reading that trusts nothing.

Writing goes to a temporary name beside the target, is synced to the disk, then renamed.  Reading checks the header of
a safetensors file (sizes, shapes, offsets, counts) against the file's true length before it allocates anything; names
found in a file are dictionary keys and never become paths.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from personalize import leftovers, replacing
from personalize.errors import UserError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
MAX_HEADER_BYTES = 32 * 2**20
MAX_TENSORS = 50_000
MAX_DIMENSIONS = 8
MAX_JSON_BYTES = 16 * 2**20
Content = bytes | Iterable[bytes]  # of a file: whole, or in parts that need not be in memory at once
PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}


def create_file(path: Path) -> BinaryIO:
    """Open a new file for writing: the one door through which this project puts bytes on the disk."""
    return open(path, "xb")


def write_file(path: str | Path, content: Content, *, check: Callable[[Path], object] | None = None) -> Path:
    """Write `content` to `path` so that, whatever happens, `path` holds the old bytes or all the new ones.

    The new file takes its name after `check(temporary file)` has returned.

    Raises:
        UserError: the disk is full or the place cannot be written; the old file is untouched, no temporary stays.
        Exception: whatever `check` raises, with the same guarantee.
    """
    path = Path(path)
    with _as_user_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        leftovers.remove_stale(path)
        partial = leftovers.hidden_name(path)
        try:
            _write_synced(partial, content)
            if check is not None:
                check(partial)
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        replacing.sync_folder(path.parent)
    return path


def write_folder(
    path: str | Path,
    files: Mapping[str, Content],
    *,
    check: Callable[[Path], object] | None = None,
    keep: Iterable[str] = (),
) -> Path:
    """Put a folder holding `files`, and those entries of the old folder named in `keep`, at `path`, all or nothing.

    The folder is built beside `path` under a hidden name and takes the place of an older one in a single step, after
    `check(temporary folder)` has returned.  Names may hold slashes, which make folders inside.  Kept entries are hard
    links to the old ones where the disk allows it.  What a killed writer left behind is removed.

    Raises:
        UserError: the disk is full, or `path` cannot be replaced; what was there before is still there.
        Exception: whatever `check` raises, with the same guarantee.
    """
    path = Path(path).resolve()
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file, a folder was expected: name another output folder")
    if Path.cwd().is_relative_to(path):
        raise UserError(f"{path} is where this program runs and cannot be replaced: name a folder inside it")
    with _as_user_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        leftovers.remove_stale(path)
        partial = leftovers.hidden_name(path)
        try:
            partial.mkdir()
            for name in set(keep) - set(files):
                replacing.link_or_copy(path / name, partial / name)
            for name, content in files.items():
                target = partial.joinpath(*map(plain_name, name.split("/")))
                target.parent.mkdir(parents=True, exist_ok=True)
                _write_synced(target, content)
            for folder in {partial, *(path for path in partial.rglob("*") if path.is_dir())}:
                replacing.sync_folder(folder)
            if check is not None:
                check(partial)
            replacing.replace_folder(partial, path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)  # holds the old folder after an exchange
        replacing.sync_folder(path.parent)
    return path


def plain_name(name: str) -> str:
    """`name` itself if it names an entry of a folder and nothing else, so that it is safe to join to a path."""
    if not name or name in {".", ".."} or any(c in '/\\:*?"<>|' or ord(c) < 32 for c in name):
        raise UserError(f"{name!r} is no plain file name: use letters, digits, spaces, '-', '_' and '.'")
    return name


def unowned_files(folder: Path, ours: tuple[str, ...]) -> list[str]:
    """Names in `folder` that do not begin like one of `ours`: somebody else's, not to be touched."""
    return [path.name for path in folder.iterdir() if not path.name.startswith(ours)] if folder.is_dir() else []


def _write_synced(path: Path, content: Content) -> None:
    with create_file(path) as stream:
        for part in [content] if isinstance(content, bytes) else content:
            stream.write(part)
        stream.flush()
        os.fsync(stream.fileno())


@contextmanager
def _as_user_error(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"could not write {path}: {reason}; what was there before is unchanged") from error


@dataclass(frozen=True)
class TensorFile:
    """What a safetensors file holds: tensors by name and the header's strings."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def tensor_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """A safetensors file as bytes; equal input gives equal bytes (names and metadata are sorted)."""
    return b"".join(tensor_parts(tensors, metadata))


def tensor_parts(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, dtype: torch.dtype | None = None
) -> Iterator[bytes]:
    """A safetensors file in parts, tensor by tensor; `dtype`, if given, is what floating-point tensors are cast to."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for name in sorted(tensors):
        tensor = tensors[name]
        kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        offsets = [end, end := end + tensor.numel() * kind.itemsize]
        header[name] = {"dtype": names[kind], "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        yield tensor.to("cpu", kind).contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def read_tensors(path: str | Path) -> TensorFile:
    """Read a safetensors file whose header has been checked against the file's true length.

    Raises:
        UserError: missing, a pickle, truncated, or a header that contradicts itself or the file's length.
    """
    path = Path(path)
    with _opened(path) as stream:
        header, start = _header(stream, path)
        size = os.fstat(stream.fileno()).st_size - start
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise UserError(f"{path} is damaged: its metadata must map strings to strings")
        entries = {name: _entry(name, value, size, path) for name, value in header.items()}
        _check_layout(entries, size, path)
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as view:
            tensors = {name: _tensor(view, start, *entry) for name, entry in entries.items()}
    return TensorFile(tensors, metadata)


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object of at most 16 MiB; UserError when it is missing or something else."""
    path = Path(path)
    with _opened(path) as stream:
        text = stream.read(MAX_JSON_BYTES + 1)
    if len(text) > MAX_JSON_BYTES:
        raise UserError(f"{path} is larger than {MAX_JSON_BYTES >> 20} MiB: no JSON file of ours is")
    return _json_object(text, path)


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        if not path.is_file():  # keeps pipes and devices out, which would block
            raise UserError(f"{path} {'is no file' if path.exists() else 'does not exist'}: check the path")
        with open(path, "rb") as stream:
            yield stream
    except OSError as error:
        raise UserError(f"could not read {path}: {error.strerror or error}") from error


def _header(stream: BinaryIO, path: Path) -> tuple[dict[str, Any], int]:
    """The header as a dictionary, and where the data start."""
    prefix = stream.read(8)
    file_size = os.fstat(stream.fileno()).st_size
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, file_size - 8):
        if path.suffix.lower() in PICKLE_SUFFIXES or prefix.startswith((b"PK\x03\x04", b"\x80")):
            raise UserError(f"{path} is a pickle, which can run code when opened: convert it to .safetensors first")
        raise UserError(f"{path} is no safetensors file or is truncated ({file_size} bytes): use a .safetensors file")
    stream.seek(8)
    header = _json_object(stream.read(length), path)
    if len(header) > MAX_TENSORS:
        raise UserError(f"{path} names {len(header)} tensors, more than the {MAX_TENSORS} any model of this kind has")
    return header, 8 + length


def _json_object(text: bytes, path: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise ValueError("a name occurs twice")
        return dict(pairs)

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: its JSON cannot be read ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged: its JSON holds a {type(value).__name__}, an object was expected")
    return value


def _entry(name: str, value: Any, size: int, path: Path) -> tuple[torch.dtype, list[int], int, int]:
    """One tensor's dtype, shape and byte range, consistent with one another and inside the data."""
    try:
        dtype, shape, (begin, end) = DTYPES[value["dtype"]], value["shape"], value["data_offsets"]
        whole = isinstance(shape, list) and all(type(number) is int for number in [*shape, begin, end])
        fits = whole and len(shape) <= MAX_DIMENSIONS and min(shape, default=0) >= 0
        fits = fits and math.prod(max(1, side) for side in shape) < 2**40  # bounds the strides of empty tensors
        if fits and 0 <= begin <= end <= size and end - begin == math.prod(shape) * dtype.itemsize:
            return dtype, shape, begin, end
    except (KeyError, TypeError, ValueError, AttributeError):
        pass
    raise UserError(f"{path} is damaged: the entry of tensor {name[:120]!r} does not fit its {size} bytes of data")


def _check_layout(entries: Mapping[str, tuple[torch.dtype, list[int], int, int]], size: int, path: Path) -> None:
    """The byte ranges must tile the data: nothing shared, nothing hidden."""
    reached = 0
    for _, _, begin, end in sorted(entries.values(), key=lambda entry: entry[2:]):
        if begin != reached:
            raise UserError(f"{path} is damaged: its tensors overlap or leave a gap at byte {reached}")
        reached = end
    if reached != size:
        raise UserError(f"{path} is damaged: {size - reached} bytes belong to no tensor")


def _tensor(view: mmap.mmap, start: int, dtype: torch.dtype, shape: list[int], begin: int, end: int) -> Tensor:
    if begin == end:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(view[start + begin : start + end]), dtype=dtype).reshape(shape)
