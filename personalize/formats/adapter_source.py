"""Open what a person names as an adapter: a file, one of PEFT's folders, or a file in several shards.

What stands beside the tensors is read with them: PEFT's `adapter_config.json` holds alpha, and the folder's name or the
class of the model says which of two text encoders the tensors are for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgspec
from torch import Tensor

from personalize.errors import UserError, first_line
from personalize.formats.adapter_folders import (
    ADAPTER_CONFIG,
    DIFFUSERS_FILE,
    INDEX,
    WEIGHTS,
    no_adapter,
    peft_folders,
)
from personalize.formats.lora_keys import COMPONENTS
from personalize.formats.peft_settings import BASE_PREFIX
from personalize.io.json_files import checked, read_json
from personalize.io.pickles import read_any
from personalize.io.plain_files import visible
from personalize.io.tensor_files import TensorFile, tensor_parts
from personalize.models.config import HUB_FILE

MAX_SHARDS = 100


class ShardIndex(msgspec.Struct, frozen=True):
    """The index of a file in shards: which shard holds each tensor."""

    weight_map: dict[str, str]


def open_adapter(path: str | Path, *, allow_pickle: bool = False, peek: int | None = None) -> TensorFile:
    """The tensors and metadata of an adapter; settings beside it join the metadata (see `peft_settings`).

    Args:
        path: a safetensors file (or, with `allow_pickle`, a pickle), an index of shards, a folder of ours or of PEFT, a
            folder with one of these for each part of the model ("unet", "text_encoder", "text_encoder_2"), or a file on
            the hub (see `fetched`).
        allow_pickle: read the tensors, and nothing else, of a pickle.
        peek: if given, safetensors with more numbers than this are not read: only their shapes are there.

    Raises:
        UserError: nothing is there, or it cannot be read.
    """
    path = fetched(path)
    if path.is_dir():
        return _open_folder(path, allow_pickle, peek)
    if path.name.endswith(INDEX):
        return _open_shards(path, peek)
    content = read_any(path, allow_pickle=allow_pickle, peek=peek)
    config = path.parent / ADAPTER_CONFIG
    if config.is_file() and any(key.startswith(BASE_PREFIX) for key in content.tensors):
        return _with_settings(content, read_json(config), path.parent.name)
    return content


def fetched(path: str | Path) -> Path:
    """`path`, or for "owner/name:file.safetensors" that file of the hub's repository, which is downloaded and cached.

    Of a file of PEFT its settings are fetched too.

    Raises:
        UserError: the file is no .safetensors, or the hub does not give it.
    """
    match = HUB_FILE.fullmatch(str(path))
    if match is None or Path(path).exists():
        return Path(path)
    repository, name = match[1], match[2]
    if not name.endswith(".safetensors"):
        raise UserError(f"{path}: only .safetensors files are taken from the hub, for pickles can run code")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        if name.rpartition("/")[2] in WEIGHTS:
            try:
                hf_hub_download(repository, name.rpartition("/")[0] + "/" * ("/" in name) + ADAPTER_CONFIG)
            except EntryNotFoundError:
                pass  # alpha may stand in the file itself
        return Path(hf_hub_download(repository, name))
    except Exception as error:  # the library, its HTTP client and the network raise different types
        raise UserError(f"cannot get {name} of {repository} from the hub: {first_line(error)[:160]}") from error


def adapter_hash(path: Path) -> str:
    """The SHA-256 of all that is read of an adapter which is in several files, a folder or an index of shards."""
    content, digest = open_adapter(path), sha256()
    for part in tensor_parts(content.tensors, content.metadata):
        digest.update(part)
    return digest.hexdigest()


def _open_folder(folder: Path, allow_pickle: bool, peek: int | None) -> TensorFile:
    """The tensors of PEFT's folder, of one such folder for each part of the model, or of a file in shards."""
    indices = visible(folder, f"*{INDEX}")
    folders = peft_folders(folder)
    if not folders and (folder / DIFFUSERS_FILE).is_file():  # a folder of ours, or of diffusers' own scripts
        return open_adapter(folder / DIFFUSERS_FILE, allow_pickle=allow_pickle, peek=peek)
    if not folders and len(indices) == 1:
        return _open_shards(indices[0], peek)
    if not folders:
        raise UserError(no_adapter(folder))
    if list(folders) == [""]:
        return open_adapter(folders[""], allow_pickle=allow_pickle, peek=peek)
    tensors: dict[str, Tensor] = {}
    settings: dict[str, Any] = {}
    metadata: dict[str, str] = {}
    for part, file in folders.items():
        own = read_any(file, allow_pickle=allow_pickle, peek=peek)
        tensors |= {f"{part}.{key}": tensor for key, tensor in own.tensors.items()}
        metadata |= own.metadata
        settings |= {f"{part}.{key}": value for key, value in read_json(file.parent / ADAPTER_CONFIG).items()}
    return TensorFile(tensors, metadata | {"lora_adapter_metadata": json.dumps(settings)})


def _with_settings(content: TensorFile, config: Mapping[str, Any], folder: str) -> TensorFile:
    """The content of one of PEFT's files with its settings; keys get the part of the model where it is not obvious."""
    tensors, part = content.tensors, _part(config, folder)
    if part.startswith("text_"):
        tensors = {f"{part}.{key}": tensor for key, tensor in tensors.items()}
    return TensorFile(tensors, content.metadata | {ADAPTER_CONFIG: json.dumps(dict(config))})


def _part(config: Mapping[str, Any], folder: str) -> str:
    """The part of the model that a folder of PEFT is for, by its name or by the class of the model; "" if unknown."""
    if folder in COMPONENTS:
        return folder
    mapping = config.get("auto_mapping")
    model = str(mapping.get("base_model_class") or "") if isinstance(mapping, dict) else ""
    classes = {"CLIPTextModelWithProjection": "text_encoder_2", "CLIPTextModel": "text_encoder"}
    return classes.get(model, "")


def _open_shards(index: Path, peek: int | None) -> TensorFile:
    """All tensors of a file in shards, by the index that transformers and diffusers write beside them.

    Raises:
        UserError: an index that is damaged or names a file elsewhere, or a shard that lacks a tensor.
    """
    names = checked(read_json(index), ShardIndex, index).weight_map
    files = sorted(set(names.values()))
    if not 0 < len(files) <= MAX_SHARDS or any(Path(name).name != name for name in files):
        raise UserError(f"{index} names {len(files)} shards, 1 to {MAX_SHARDS} files beside it were expected")
    tensors, metadata = {}, {}
    for name in files:
        shard = read_any(index.parent / name, peek=peek)
        tensors, metadata = tensors | shard.tensors, metadata | shard.metadata
    if tensors.keys() != names.keys():
        odd = min(tensors.keys() ^ names.keys())
        raise UserError(f"{index} and its shards do not agree on the tensor {odd[:80]!r}: get the files again")
    return TensorFile(tensors, metadata)
