"""Work in a child process that is killed, and what is counted afterwards."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from tests.support.children import living

GRACE = 60.0  # seconds that processes have to end


def child(work: Callable[[], object], said: str | Path = os.devnull) -> int:
    """Start `work` in a fork with a process group of its own, which writes into the file `said`; returns its id."""
    process = os.fork()
    if process:
        return process
    os.setpgid(0, 0)
    torch.set_num_threads(1)
    file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)
    code: Any = 1
    try:
        code = work()
    finally:
        os._exit(code if isinstance(code, int) else 0)


def finished(process: int) -> int:
    """Wait for a child; its exit code."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


class TooLate(Exception):
    """The work had ended before the signal came."""


def killed(work: Callable[[], object], number: int, after: float, said: Path) -> int:
    """Start `work`, and `hit` it with the signal `number` after some seconds; how many processes of it are left."""
    process = child(work, said)
    time.sleep(after)
    return hit(process, number)


def hit(process: int, number: int) -> int:
    """Send the signal `number` to a child, and wait for its end; how many processes of it are left.

    Raises:
        TooLate: it had ended before.
    """
    if os.waitpid(process, os.WNOHANG)[0]:
        raise TooLate
    os.kill(process, number)
    finished(process)
    return living(GRACE)


def noisy(said: Path) -> bool:
    """Has the killed work said more than one line about its end, or a traceback?"""
    lines = said.read_text(errors="replace").splitlines() if said.exists() else []  # killed before it could open it
    foreign = any("Traceback" in line or "torch/distributed/elastic" in line for line in lines)
    return foreign or sum(line.startswith("personalize: ") for line in lines) > 1


def hidden(*folders: Path) -> int:
    """Hidden files and folders that our program has left in these folders."""
    return sum(len(list(folder.glob(".*"))) for folder in folders if folder.is_dir())


def theirs(folder: Path, begun: float) -> list[Path]:
    """Files that another program puts into the folder, named by a moment."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"theirs-{begun}", folder / "logs" / f"theirs-{begun}"]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        file.write_text("theirs")
    return files


def row(
    equal: bool, files: Iterable[Path], alive: int, hidden_files: int, said: Path | None = None, **more: Any
) -> dict[str, Any]:  # fmt: skip
    lost, loud = sum(not file.is_file() for file in files), said is not None and noisy(said)
    return {"equal": equal, "lost": lost, "left": alive, "hidden": hidden_files, "noisy": loud, **more}
