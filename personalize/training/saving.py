"""Save a trained adapter, in another folder if the one that was named fails, and even if a signal arrives meanwhile."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from personalize.adapters.adapter import Adapter
from personalize.errors import Stopped, UserError
from personalize.io.numbering import unused_folder
from personalize.io.output_folder import check_space
from personalize.training.stopping import stop_requests

MARGIN = 2 * 10**6  # bytes: card, manifest, source embedding, pictures


def save_trained(adapter: Adapter, folder: str | Path, **options: Any) -> Path:
    """`adapter.save(folder, **options)`; if that fails, the adapter is saved elsewhere before the error is raised.

    A signal to stop is obeyed when the adapter is saved.

    Raises:
        UserError: `folder` cannot be written; the message names the folder that was written in its place, which is
            `NAME-rescued` in the current or else in the temporary directory.
        Stopped: a signal has arrived.
    """
    with stop_requests() as stop:
        saved = _save_or_rescue(adapter, Path(folder), options)
    if stop.signal is not None:
        raise Stopped(stop.signal, f"stopped; the adapter is saved in {saved}")
    return saved


def _save_or_rescue(adapter: Adapter, folder: Path, options: dict[str, Any]) -> Path:
    try:
        return adapter.save(folder, **options)
    except Exception as error:  # whatever it is: the training is at stake
        rescued = next((place for place in _rescue_folders(folder) if _saved(adapter, place, options)), None)
        if rescued is None:
            raise
        raise UserError(f"{error}; the adapter is saved in {rescued} instead: move it where it belongs") from error


def _saved(adapter: Adapter, folder: Path, options: dict[str, Any]) -> bool:
    with suppress(Exception):
        adapter.save(folder, **options)
        return True
    return False


def _rescue_folders(folder: Path) -> Iterator[Path]:
    """Folders to try, none of which exists."""
    name = f"{folder.absolute().name[:50] or 'adapter'}-rescued"
    yield unused_folder(str(Path.cwd() / name), "")
    with suppress(OSError):
        yield Path(tempfile.mkdtemp(prefix="personalize-")) / name


def check_space_for(config: Any, run: Any) -> None:
    """UserError unless the disk has room for the adapter, twice, and for the checkpoints that a run will write.

    A checkpoint holds what is trained, its two moments, and the adapter in two layouts; the average and the best of
    what is trained if there are these.
    """
    trained = 4 * sum(tensor.numel() for tensor in run.objective.resumable().values())
    count = (run.updates - run.update) // config.checkpointing_steps if config.checkpointing_steps else 0
    if config.checkpoints_total_limit is not None:
        count = min(count, config.checkpoints_total_limit + 1)
    copies = 5 + (run.average is not None) + (run.best is not None)
    largest = trained * (2 if count else 1)
    check_space(config.output_dir, largest + MARGIN, trained * (4 + copies * count) + 2 * MARGIN)
