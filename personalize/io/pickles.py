"""Read adapter files that may be pickles, as older programs wrote them: only if allowed, and without running code."""

from __future__ import annotations

import itertools
import pickletools
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from personalize.errors import UserError
from personalize.io.plain_files import opened
from personalize.io.tensor_files import (
    FIRST_BYTES,
    MAX_TENSORS,
    PICKLE_SUFFIXES,
    TensorFile,
    no_tensors,
    read_tensors,
)

MAX_DEPTH = 8  # of dictionaries in dictionaries
MAX_ENTRIES = 1_000_000  # of all dictionaries, each counted as often as it is reached: they may hold one another
MAX_STREAM_BYTES = 4 * 2**20  # of the pickle itself, without the tensors' data, which lie behind it or beside it
MAX_SHARING = 4  # times the file's size: what its tensors hold, several of which may lie in one storage
STREAMS = 5  # pickles in a row at the beginning of a file of torch's older format
MAKES_BYTES = "bytearray"  # torch lets a pickle call it with a number of bytes, however large


def is_pickle(path: str | Path) -> bool:
    """True if the file is a pickle by its first bytes (a zip archive, or protocol 2 and later), or else by its name.

    An empty file, a pointer of Git LFS or a text is none, whatever its name.
    """
    path = Path(path)
    if not path.is_file():
        return False
    with opened(path) as stream:
        first = stream.read(FIRST_BYTES)
    if first[8:9] == b"{":  # a safetensors header, whatever the length before it looks like and the file is called
        return False
    if no_tensors(first):
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
            f"{path} is a pickle, which can run code when opened: get it as .safetensors, or let `personalize convert "
            "--allow_pickle` make one of its tensors alone"
        )
    try:
        _check_unpacked_size(path)
        _check_streams(path)
        with torch.serialization.safe_globals([nn.ParameterDict]):  # as the original textual inversion saved its rows
            value = torch.load(path, map_location="cpu", weights_only=True)
        tensors = _copies(_flat(value, "", MAX_DEPTH, itertools.count(1)), MAX_SHARING * path.stat().st_size)
    except Exception as error:  # a hostile pickle can make torch raise anything
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise UserError(f"{path} is no pickle of plain tensors: {reason}") from error
    if not tensors:
        raise UserError(f"{path} holds no tensors: is it an adapter?")
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


def _check_streams(path: Path) -> None:
    """UserError if the pickle itself is larger than any adapter's, or builds bytes by their number."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.rpartition("/")[2] == "data.pkl":
                    with archive.open(name) as stream:
                        _check_stream(stream)
        return
    with opened(path) as stream:
        for _ in range(STREAMS):
            if not _check_stream(stream):
                return


def _check_stream(stream: IO[bytes]) -> bool:
    """Check one pickle; False if it ends in a fault, at which torch stops too."""
    start, ended = stream.tell(), False
    try:
        for opcode, argument, position in pickletools.genops(stream):
            if isinstance(argument, str) and MAKES_BYTES in argument.split():
                raise UserError(f"it calls {MAKES_BYTES}, which no adapter needs")
            if (position or 0) - start > MAX_STREAM_BYTES:
                raise UserError(f"its list of contents is larger than {MAX_STREAM_BYTES >> 20} MiB")
            ended = opcode.name == "STOP"
    except UserError:
        raise
    except Exception:  # whatever pickletools makes of bytes that are no pickle
        return False
    return ended


def _copies(found: Iterator[tuple[str, Tensor]], most_bytes: int) -> dict[str, Tensor]:
    """A copy of each tensor by name; UserError before they are more than `MAX_TENSORS`, or hold over `most_bytes`."""
    tensors, total = {}, 0
    for name, tensor in found:
        total += tensor.numel() * tensor.itemsize
        if total > most_bytes:  # expanded over and over from one number
            raise UserError("its tensors claim more numbers than the file holds")
        if len(tensors) >= MAX_TENSORS:
            raise UserError(f"it holds more than {MAX_TENSORS} tensors, more than any adapter has: is it a checkpoint?")
        tensors[name] = tensor.detach().clone()
    return tensors


def _flat(value: Any, prefix: str, depth: int, entries: Iterator[int]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in nested dictionaries of at most `depth` levels, by its keys joined with dots."""
    if next(entries) > MAX_ENTRIES:
        raise UserError(f"it holds more than {MAX_ENTRIES:,} values, each counted as often as it is reached")
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
            raise UserError(f"its tensor {prefix[:120]!r} is sparse, quantized or without numbers")
        yield prefix or "tensor", value
    elif isinstance(value, dict | nn.ParameterDict) and depth:
        for key, inner in value.items():
            yield from _flat(inner, f"{prefix}.{key}" if prefix else str(key), depth - 1, entries)
