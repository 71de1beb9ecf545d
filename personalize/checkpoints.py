"""Checkpoints: folders `checkpoint-N`, whole or absent, from which a run goes on as if it had never stopped.

All randomness is keyed by update and sample, so a state is the trainable tensors, the optimiser's and N, the number of
finished updates.  Nothing is pickled.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from personalize.errors import UserError
from personalize.files import read_json, read_tensors, tensor_bytes, write_folder

TRAINABLE, OPTIMIZER, STATE = "trainable.safetensors", "optimizer.safetensors", "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """A run after `update` updates; `about` describes the run, and must be the same to go on."""

    update: int
    trainable: dict[str, Tensor]
    optimizer: dict[str, Any]
    about: dict[str, Any] = field(default_factory=dict)
    scaler: dict[str, Any] = field(default_factory=dict)


def save(
    output_dir: str | Path,
    checkpoint: Checkpoint,
    *,
    limit: int | None = None,
    extra: Mapping[str, bytes] | None = None,
) -> Path:
    """Write `output_dir/checkpoint-N` atomically, then remove the oldest beyond `limit`.

    `extra` files are put beside ours, e.g. an adapter other programs can load.  A later checkpoint that a former run
    left in `output_dir` is neither counted nor removed.

    Raises:
        UserError: the disk is full or cannot be written; older checkpoints are still there.
    """
    tensors, settings = _flattened(checkpoint.optimizer)
    files = dict(extra or {})
    files[TRAINABLE] = tensor_bytes(checkpoint.trainable)
    files[OPTIMIZER] = tensor_bytes(tensors)
    state = {
        "update": checkpoint.update,
        "about": checkpoint.about,
        "optimizer": settings,
        "scaler": checkpoint.scaler,
        "sha256": {name: sha256(files[name]).hexdigest() for name in (TRAINABLE, OPTIMIZER)},
    }
    files[STATE] = json.dumps(state, indent=1, sort_keys=True).encode()
    folder = write_folder(Path(output_dir) / f"checkpoint-{checkpoint.update}", files)
    if limit is not None:
        mine = [path for number, path in numbered(output_dir) if number <= checkpoint.update]
        for path in mine[: max(0, len(mine) - max(1, limit))]:
            shutil.rmtree(path)
    return folder


def numbered(output_dir: str | Path) -> list[tuple[int, Path]]:
    """The checkpoint folders of a run with their numbers, the oldest first."""
    found = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in Path(output_dir).glob("checkpoint-*")]
    return sorted((int(match[1]), path) for match, path in found if match and path.is_dir())


def find(output_dir: str | Path, resume_from: str | None) -> Checkpoint | None:
    """The checkpoint to go on from: None, a path (or the name of one in `output_dir`), or the "latest" whole one.

    With "latest", damaged or half-written folders are passed over, and None means there is none: start afresh.

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
        except UserError:
            continue
    return None


def load(folder: str | Path) -> Checkpoint:
    """Read one checkpoint folder; UserError if it is missing, incomplete or damaged."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no checkpoint at {folder}: name a checkpoint-N folder, or 'latest'")
    state = read_json(folder / STATE)
    try:
        for name, expected in state["sha256"].items():
            if sha256((folder / name).read_bytes()).hexdigest() != expected:
                raise UserError(f"checkpoint {folder} is damaged: {name} is not what was written; use an older one")
        tensors = read_tensors(folder / OPTIMIZER).tensors
        optimizer = _restored(tensors, state["optimizer"])
        trainable = read_tensors(folder / TRAINABLE).tensors
        return Checkpoint(state["update"], trainable, optimizer, state["about"], state["scaler"])
    except (KeyError, TypeError, AttributeError, OSError) as error:
        raise UserError(f"checkpoint {folder} is incomplete ({error}): use an older one") from None


def restore(checkpoint: Checkpoint, trainable: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Copy a checkpoint into the live parameters and the optimiser.

    Raises:
        UserError: other names or shapes than the run has.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in trainable.items()}
    stored = {name: tuple(tensor.shape) for name, tensor in checkpoint.trainable.items()}
    if shapes != stored:
        name = next(name for name in [*shapes, *stored] if shapes.get(name) != stored.get(name))
        raise UserError(f"the checkpoint does not fit: {name} is {stored.get(name)} there, {shapes.get(name)} here")
    with torch.no_grad():
        for name, parameter in trainable.items():
            parameter.copy_(checkpoint.trainable[name])
    optimizer.load_state_dict(checkpoint.optimizer)


def check_same_run(checkpoint: Checkpoint, about: Mapping[str, Any]) -> None:
    """UserError, naming the first setting that differs, unless the checkpoint comes from this very run."""
    for key in sorted({*checkpoint.about, *about}):
        then, now = checkpoint.about.get(key), about.get(key)
        if then != now:
            raise UserError(
                f"cannot resume: the checkpoint was made with {key} = {then}, this run has {now}; "
                "use the same settings or start without --resume_from_checkpoint"
            )


def _flattened(state_dict: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimiser's state as tensors by name "<parameter>/<key>", and all else as plain values.

    bitsandbytes puts some a level deeper: "<parameter>/<key>/<key>".
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


def _restored(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> dict[str, Any]:
    state: dict[Any, Any] = {}
    for name, value in {**tensors, **settings["values"]}.items():
        number, *path, key = name.split("/")
        entries = state.setdefault(int(number), {})
        for part in path:
            entries = entries.setdefault(part, {})
        entries[key] = value
    return {"state": state, "param_groups": settings["param_groups"]}
