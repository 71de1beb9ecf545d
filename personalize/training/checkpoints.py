"""Checkpoints: folders `checkpoint-N` from which a run continues, to the bit, as if it had never stopped.

A folder is written whole or not at all.  All randomness is keyed by update and sample, so the state of a run is its
trained tensors, the optimizer's, and N, the number of finished updates.  Nothing is pickled.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from personalize.errors import Notice, UserError
from personalize.io.atomic import write_folder
from personalize.io.plain_files import file_hash
from personalize.io.tensor_files import read_json, read_tensors, tensor_bytes

TRAINABLE, OPTIMIZER, STATE = "trainable.safetensors", "optimizer.safetensors", "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after `update` updates; `metadata` must be equal in the run that resumes from it."""

    update: int
    trainable: dict[str, Tensor]
    optimizer: dict[str, Any]
    metadata: dict[str, Any] = field(default_factory=dict)
    scaler: dict[str, Any] = field(default_factory=dict)


def save(
    output_dir: str | Path,
    checkpoint: Checkpoint,
    *,
    limit: int | None = None,
    extra: Mapping[str, bytes] | None = None,
) -> Path:
    """Write `output_dir/checkpoint-N` atomically, then keep only the newest `limit` checkpoints.

    `extra` are further files by name, e.g. an adapter that other programs can load.  A checkpoint of more updates, left
    in `output_dir` by an earlier run, is neither counted nor removed.

    Raises:
        UserError: the disk is full or cannot be written; older checkpoints are untouched.
    """
    tensors, settings = _flattened(checkpoint.optimizer)
    files = dict(extra or {})
    files[TRAINABLE] = tensor_bytes(checkpoint.trainable)
    files[OPTIMIZER] = tensor_bytes(tensors)
    state = {
        "update": checkpoint.update,
        "about": checkpoint.metadata,
        "optimizer": settings,
        "scaler": checkpoint.scaler,
        "sha256": {name: sha256(files[name]).hexdigest() for name in (TRAINABLE, OPTIMIZER)},
    }
    files[STATE] = json.dumps(state, indent=1, sort_keys=True).encode()
    folder = write_folder(Path(output_dir) / f"checkpoint-{checkpoint.update}", files)
    if limit is not None:
        own = [path for number, path in numbered(output_dir) if number <= checkpoint.update]
        for path in own[: max(0, len(own) - max(1, limit))]:
            shutil.rmtree(path)
    return folder


def numbered(output_dir: str | Path) -> list[tuple[int, Path]]:
    """The checkpoint folders of a run with their numbers, the oldest first."""
    matches = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in Path(output_dir).glob("checkpoint-*")]
    return sorted((int(match[1]), path) for match, path in matches if match and path.is_dir())


def find(output_dir: str | Path, resume_from: str | None) -> Checkpoint | None:
    """The checkpoint that `resume_from` names: a path, a folder in `output_dir`, or "latest"; None if it is None.

    "latest" is the newest whole checkpoint: unusable ones are passed over with a Notice that names them, and None means
    that there is no whole one.

    Raises:
        UserError: the named checkpoint is missing or damaged.
    """
    if resume_from is None:
        return None
    if resume_from != "latest":
        inside = Path(output_dir) / resume_from
        return load(inside if inside.is_dir() else Path(resume_from))
    for _, path in reversed(numbered(output_dir)):
        try:
            return load(path)
        except UserError as error:
            warnings.warn(f"passed over: {error}", Notice, stacklevel=2)
    return None


def find_together(output_dir: str | Path, resume_from: str | None, accelerator: Any) -> Checkpoint | None:
    """`find` for a group of processes that may not share a disk: the main process decides, and all load the same one.

    Raises:
        UserError, on every process: one of them lacks that checkpoint, or has a damaged one.
    """
    if accelerator.num_processes == 1:
        return find(output_dir, resume_from)
    checkpoint, problem = None, None
    if accelerator.is_main_process:
        checkpoint, problem = _attempt(lambda: find(output_dir, resume_from))
    decided: list[Any] = [(None if checkpoint is None else checkpoint.update, problem)]
    broadcast_object_list(decided)
    update, problem = decided[0]
    if problem is None and update is not None and not accelerator.is_main_process:
        name = f"checkpoint-{update}" if resume_from == "latest" else resume_from
        checkpoint, problem = _attempt(lambda: find(output_dir, name))
        if checkpoint is not None and checkpoint.update != update:
            problem = f"the checkpoint {name} has {checkpoint.update} updates, that of the main process {update}"
    problems = gather_object([problem])
    for process, text in enumerate(problems):
        if text is not None:
            raise UserError(f"process {process}: {text}; copy the checkpoint to every machine, or use a shared folder")
    return checkpoint


def _attempt(call: Callable[[], Checkpoint | None]) -> tuple[Checkpoint | None, str | None]:
    """The result of `call`, or the message of its UserError."""
    try:
        return call(), None
    except UserError as error:
        return None, str(error)


def load(folder: str | Path) -> Checkpoint:
    """Read one checkpoint folder; UserError if it is missing, incomplete or damaged."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no checkpoint at {folder}: name a checkpoint-N folder, or 'latest'")
    state = read_json(folder / STATE)
    _check_state(state, folder)
    try:
        for name in (OPTIMIZER, TRAINABLE):
            if file_hash(folder / name) != state["sha256"][name]:
                raise UserError(f"checkpoint {folder} is damaged: {name} is not what was written; use an older one")
        tensors = read_tensors(folder / OPTIMIZER).tensors
        optimizer = _unflattened(tensors, state["optimizer"])
        trainable = read_tensors(folder / TRAINABLE).tensors
        return Checkpoint(state["update"], trainable, optimizer, state["about"], state["scaler"])
    except (KeyError, TypeError, AttributeError, OSError) as error:
        raise UserError(f"checkpoint {folder} is incomplete ({error}): use an older one") from None


def _check_state(state: Mapping[str, Any], folder: Path) -> None:
    """UserError unless the entries of a checkpoint's state are of the kinds that `save` writes."""
    kinds = {"update": int, "about": dict, "optimizer": dict, "scaler": dict, "sha256": dict}
    wrong = [key for key, kind in kinds.items() if not isinstance(state.get(key), kind) or state[key] is True]
    groups = None if wrong else state["optimizer"].get("param_groups")
    if not wrong and not (isinstance(groups, list) and groups and all(isinstance(group, dict) for group in groups)):
        wrong = ["optimizer"]
    if wrong:
        raise UserError(f"checkpoint {folder} is damaged: {wrong[0]} in {STATE} is not what was written; use another")


def restore(checkpoint: Checkpoint, trainable: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Copy a checkpoint's tensors into the parameters of a run and into its optimizer.

    Raises:
        UserError: the checkpoint's parameters have other names or shapes than the run's.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in trainable.items()}
    stored = {name: tuple(tensor.shape) for name, tensor in checkpoint.trainable.items()}
    if shapes != stored:
        name = next(name for name in [*shapes, *stored] if shapes.get(name) != stored.get(name))
        raise UserError(f"the checkpoint does not fit: {name} is {stored.get(name)} there, {shapes.get(name)} here")
    with torch.no_grad():
        for name, parameter in trainable.items():
            parameter.copy_(checkpoint.trainable[name])
    try:
        optimizer.load_state_dict(checkpoint.optimizer)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"the checkpoint's optimizer does not fit this run ({error}): use another checkpoint") from None


IN_WORDS = {  # entries of the metadata that are no options
    "data_sha256": "other pictures or masks", "base": "another base model", "caption": "another caption",
    "captions": "other captions", "size": "pictures of another size", "processes": "another number of processes",
}  # fmt: skip


def check_same_run(checkpoint: Checkpoint, metadata: Mapping[str, Any]) -> None:
    """UserError, naming the first setting that differs, if the checkpoint was made with other settings or data."""
    for key in sorted({*checkpoint.metadata, *metadata}):
        then, now = checkpoint.metadata.get(key), metadata.get(key)
        if then != now:
            short = isinstance(then, int | float | str | None) and isinstance(now, int | float | str | None)
            values = f" ({then}, this run has {now})" if short and key != "data_sha256" else ""
            what = f"{IN_WORDS[key]}{values}" if key in IN_WORDS else f"{key} = {then}, this run has {now}"
            raise UserError(
                f"cannot resume: the checkpoint was made with {what}; use the same, or start without "
                "--resume_from_checkpoint"
            )


def _flattened(state_dict: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as tensors by name "<parameter>/<key>", and everything else as plain values.

    bitsandbytes nests some a level deeper: "<parameter>/<key>/<key>".
    """
    tensors, values = {}, {}

    def walk(path: str, entries: Mapping[Any, Any]) -> None:
        for key, value in entries.items():
            if isinstance(value, Mapping):
                walk(f"{path}{key}/", value)
            else:
                (tensors if isinstance(value, Tensor) else values)[f"{path}{key}"] = value

    walk("", state_dict["state"])
    return tensors, {"values": values, "param_groups": state_dict["param_groups"]}


def _unflattened(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict that `_flattened` was given."""
    state: dict[Any, Any] = {}
    for name, value in {**tensors, **settings["values"]}.items():
        number, *path, key = name.split("/")
        entries = state.setdefault(int(number), {})
        for part in path:
            entries = entries.setdefault(part, {})
        entries[key] = value
    return {"state": state, "param_groups": settings["param_groups"]}
