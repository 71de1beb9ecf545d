"""Checkpoints: folders `checkpoint-N` from which a run continues, to the bit, as if it had never stopped.

A folder is written whole or not at all.  All randomness is keyed by update and sample, so the state of a run is its
trained tensors, the optimizer's, and N, the number of finished updates.  Nothing is pickled.

On CUDA "to the bit" holds with `torch.use_deterministic_algorithms(True)`: the ordinary kernels of attention's and of
convolutions' backward passes add in no fixed order, so that two runs agree by rounding.

Runs with other settings or data may have checkpoints in the same folder: a run takes and removes its own alone, and
calls them `checkpoint-N-<8 hex digits>` where another run has that N.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from personalize.errors import Notice, UserError
from personalize.io.atomic import plain_name, write_folder
from personalize.io.json_files import read_json
from personalize.io.plain_files import file_hash
from personalize.io.tensor_files import read_tensors, tensor_bytes
from personalize.training.optimizer_state import computed_like, flattened, unflattened

TRAINABLE, OPTIMIZER, STATE = "trainable.safetensors", "optimizer.safetensors", "state.json"
NAME = re.compile(r"checkpoint-(\d{1,9})(?:-[0-9a-f]{8})?")
MOST_UPDATES = 10**8  # more than any run of this kind has made


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after `update` updates; `metadata` must be equal in the run that resumes from it."""

    update: int
    trainable: dict[str, Tensor]
    optimizer: dict[str, Any]
    metadata: dict[str, Any] = field(default_factory=dict)
    scaler: dict[str, Any] = field(default_factory=dict)
    name: str = ""  # of its folder, if it was read from one

    @property
    def run(self) -> str:
        """A hash of the settings and data of the run that the checkpoint belongs to."""
        return _hash(_compared(self.metadata))


def save(
    output_dir: str | Path,
    checkpoint: Checkpoint,
    *,
    limit: int | None = None,
    extra: Mapping[str, bytes] | None = None,
) -> Path:
    """Write `output_dir/checkpoint-N` atomically, then keep only the newest `limit` checkpoints.

    `extra` are further files by name, e.g. an adapter that other programs can load.  Checkpoints of more updates, and
    those of runs with other settings or data, are neither counted nor removed or replaced.

    Raises:
        UserError: the disk is full or cannot be written; older checkpoints are untouched.
    """
    tensors, settings = flattened(checkpoint.optimizer)
    files = dict(extra or {})
    files[TRAINABLE] = tensor_bytes(checkpoint.trainable)
    files[OPTIMIZER] = tensor_bytes(tensors)
    state = {
        "update": checkpoint.update,
        "about": checkpoint.metadata,
        "optimizer": settings,
        "scaler": checkpoint.scaler,
        "sha256": {name: sha256(content).hexdigest() for name, content in files.items()},
        "run": checkpoint.run,
    }
    files[STATE] = json.dumps(state | {"checksum": _hash(state)}, indent=1, sort_keys=True).encode()
    folder = _own_folder(Path(output_dir), checkpoint)
    older = {path: _written(path) for number, path in numbered(output_dir) if number <= checkpoint.update}
    own = [path for path, about in older.items() if about.get("run") == checkpoint.run and path != folder]
    write_folder(folder, files)
    for path in () if limit is None else own[: max(0, len(own) + 1 - max(1, limit))]:
        _remove(path, older[path]["sha256"])
    return folder


def numbered(output_dir: str | Path) -> list[tuple[int, Path]]:
    """The checkpoint folders of a run with their numbers, the oldest first."""
    matches = [(NAME.fullmatch(path.name), path) for path in Path(output_dir).glob("checkpoint-*")]
    return sorted((int(match[1]), path) for match, path in matches if match and path.is_dir())


def _hash(values: Mapping[str, Any]) -> str:
    """SHA-256 of values that JSON can hold, which does not change when they are written and read."""
    return sha256(json.dumps(json.loads(json.dumps(values)), sort_keys=True).encode()).hexdigest()


def _compared(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """`metadata` without the name of the base, which has another one in another place: its hash says which it is."""
    base = metadata.get("base")
    if not isinstance(base, dict) or not base.get("sha256"):
        return dict(metadata)
    return {**metadata, "base": {**base, "name": ""}}


def _own_folder(output_dir: Path, checkpoint: Checkpoint) -> Path:
    """The folder for a checkpoint, in which no other run has one."""
    folder = output_dir / f"checkpoint-{checkpoint.update}"
    other = _written(folder).get("run") not in (None, checkpoint.run)
    return folder.with_name(f"{folder.name}-{checkpoint.run[:8]}") if other else folder


def _written(folder: Path) -> dict[str, Any]:
    """What a checkpoint's state says, if it is what was written; else nothing."""
    try:
        state = read_json(folder / STATE)
        _check_state(state, folder)
        return state
    except UserError:
        return {}


def _remove(folder: Path, names: Iterable[str]) -> None:
    """Remove a checkpoint's own files, its state last, so that one that is killed on the way is removed later."""
    for name in [*names, STATE]:
        (folder / plain_name(name)).unlink(missing_ok=True)
    with suppress(OSError):  # another program has put something into it
        folder.rmdir()


def find(
    output_dir: str | Path, resume_from: str | None, metadata: Mapping[str, Any] | None = None, most: int = MOST_UPDATES
) -> Checkpoint | None:
    """The checkpoint that `resume_from` names: a path, a folder in `output_dir`, or "latest"; None if it is None.

    "latest" is the newest whole checkpoint, with `metadata` the newest of the run that has these, if there is one of at
    `most` so many updates: unusable ones are passed over with a Notice, and None means that there is no whole one.

    Raises:
        UserError: the named checkpoint is missing or damaged; or there are some, but all of other runs.
    """
    if resume_from is None:
        return None
    if resume_from != "latest":
        inside = Path(output_dir) / resume_from
        return load(inside if inside.is_dir() else Path(resume_from))
    others, found = [], numbered(output_dir)
    for _, path in reversed([one for one in found if one[0] <= most] or found):  # a longer run may have been here
        try:
            checkpoint = load(path)
        except UserError as error:
            warnings.warn(f"passed over: {error}", Notice, stacklevel=2)
            continue
        if metadata is None or checkpoint.run == _hash(_compared(metadata)):
            return checkpoint
        others.append(checkpoint)
    for checkpoint in others:
        check_same_run(checkpoint, metadata or {})  # raises: what differs is said of the newest
    return None


def find_together(
    output_dir: str | Path, resume_from: str | None, accelerator: Any, metadata: Mapping[str, Any] | None = None,
    most: int = MOST_UPDATES,
) -> Checkpoint | None:  # fmt: skip
    """`find` for a group of processes that may not share a disk: the main process decides, and all load the same one.

    Raises:
        UserError, on every process: that of `find` on the main one; or another lacks that checkpoint.
    """
    if accelerator.num_processes == 1:
        return find(output_dir, resume_from, metadata, most)
    main = accelerator.is_main_process
    checkpoint, problem = _attempt(lambda: find(output_dir, resume_from, metadata, most)) if main else (None, None)
    decided: list[Any] = [(None, "", problem) if checkpoint is None else (checkpoint.update, checkpoint.name, problem)]
    broadcast_object_list(decided)
    update, latest, problem = decided[0]
    if problem is not None:
        raise UserError(problem)
    if update is not None and not main:
        name = latest if resume_from == "latest" else resume_from
        checkpoint, problem = _attempt(lambda: find(output_dir, name))
        if checkpoint is not None and checkpoint.update != update:
            problem = f"the checkpoint {name} has {checkpoint.update} updates, that of the main process {update}"
    for process, text in enumerate(gather_object([problem])):
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
        for name in (TRAINABLE, OPTIMIZER):  # `edit --auto` may have remembered strengths in the adapter's manifest
            if file_hash(folder / name) != state["sha256"][name]:
                raise UserError(f"checkpoint {folder} is damaged: {name} is not what was written; use an older one")
        optimizer = unflattened(read_tensors(folder / OPTIMIZER).tensors, state["optimizer"])
        trainable = read_tensors(folder / TRAINABLE).tensors
        return Checkpoint(state["update"], trainable, optimizer, state["about"], state["scaler"], folder.name)
    except UserError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, OSError) as error:
        raise UserError(f"checkpoint {folder} is incomplete ({error}): use an older one") from None


def _check_state(state: Mapping[str, Any], folder: Path) -> None:
    """UserError unless the entries of a checkpoint's state are of the kinds that `save` writes."""
    kinds = {"update": int, "about": dict, "optimizer": dict, "scaler": dict, "sha256": dict, "run": str}
    wrong = [key for key, kind in kinds.items() if not isinstance(state.get(key), kind) or state[key] is True]
    groups = None if wrong else state["optimizer"].get("param_groups")
    if not wrong and not (isinstance(groups, list) and groups and all(isinstance(group, dict) for group in groups)):
        wrong = ["optimizer"]
    match = NAME.fullmatch(folder.name)  # a folder may have been given another name
    if not wrong and (not 0 <= state["update"] <= MOST_UPDATES or (match and int(match[1]) != state["update"])):
        wrong = [f"update {state['update']}"]
    if not wrong and state.get("checksum") != _hash({key: value for key, value in state.items() if key != "checksum"}):
        wrong = ["an entry"]
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
        optimizer.load_state_dict(computed_like(optimizer, checkpoint.optimizer))
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"the checkpoint's optimizer does not fit this run ({error}): use another checkpoint") from None


IN_WORDS = {  # entries of the metadata that are no options
    "data_sha256": "other pictures, masks or captions", "base": "another base model", "caption": "another caption",
    "captions": "other captions", "size": "pictures of another size", "updates": "a schedule of another length",
}  # fmt: skip


def check_same_run(checkpoint: Checkpoint, metadata: Mapping[str, Any]) -> None:
    """UserError, naming the first setting that differs, if the checkpoint was made with other settings or data."""
    before, metadata = _compared(checkpoint.metadata), _compared(metadata)
    for key in sorted({*before, *metadata}):
        then, now = before.get(key), metadata.get(key)
        if then != now:
            short = isinstance(then, int | float | str | None) and isinstance(now, int | float | str | None)
            values = f" ({then}, this run has {now})" if short and key != "data_sha256" else ""
            what = f"{IN_WORDS[key]}{values}" if key in IN_WORDS else f"{key} = {then}, this run has {now}"
            raise UserError(
                f"cannot resume: the checkpoint was made with {what}; use the same, or train into another --output_dir"
            )
