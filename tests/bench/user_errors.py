"""Mistakes of users: for each command line of `tests.support.user_errors` its message and the seconds until it appears.

    python -m tests.bench.user_errors            # a few minutes; writes tests/bench/results/user_errors.md
    python -m tests.bench.user_errors --edit     # only: from `personalize edit` to the first denoising step

Goal: at most 1 s of CPU where nothing has to be loaded.  Every command is a process of its own, so that its imports
count.  Seconds of CPU are the whole process's, user and system; seconds of wall time end when the message can be read.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import tyro

from tests.support.user_errors import MISTAKES, Mistake, make_place

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).with_name("results") / "user_errors.md"
GOAL = 1.0  # s of CPU
SAMPLES = 4  # noisy copies that the adapter of the edit learns from: only its loading matters here
STEP = "From `personalize edit` to the first denoising step, embedded model, medians:"
FIRST_STEP = """
import os, sys, time
from contextlib import contextmanager
from personalize.cli.main import main
from personalize.io.progress import listening
@contextmanager
def part(name, steps, done):
    own = os.times()
    print("first step", own.user + own.system, flush=True)
    os._exit(0)
    yield
with listening(part):
    sys.exit(main(sys.argv[1:]))
"""


HEAD = f"""# What users meet: a message for each mistake, and how long it takes

    python -m tests.bench.user_errors

Goal: at most 1 s of CPU, the whole process, where nothing has to be loaded.

{STEP} not measured.

"""


@dataclass(frozen=True)
class UserErrorsBench:
    """Run the mistakes, and an edit until its first denoising step."""

    edit: bool = False
    """Only the edit; the table is left as it is."""
    repeats: int = 3
    """How often the edit is started; the median is printed."""


@dataclass(frozen=True)
class Met:
    """What a user meets: the message, and the seconds of CPU and of wall time until it appears."""

    mistake: Mistake
    code: int
    message: str
    cpu: float
    wall: float


def meet(mistake: Mistake, folder: Path) -> Met:
    """Run the command line of `mistake` in a process of its own, in `folder`."""
    command = [sys.executable, "-m", "personalize", *shlex.split(mistake.command)]
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(command, cwd=folder, env=environment(), stdout=subprocess.DEVNULL, stderr=errors)
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        wall = time.perf_counter() - start
        errors.seek(0)
        message = errors.read().strip().replace(f"{folder.resolve()}{os.sep}", "")
    return Met(mistake, child.returncode, message, used.ru_utime + used.ru_stime, wall)


def environment() -> dict[str, str]:
    """The package of this checkout, offline, and wide lines."""
    return os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}


def table(met: list[Met]) -> str:
    """One row for each mistake."""
    lines = ["| command | message | CPU s | wall s |", "|---|---|---|---|"]
    for one in met:
        command, said = (re.sub(r"([|<])", r"\\\1", text) for text in (one.mistake.command, one.message))
        said = "<br>".join(said.splitlines())
        lines.append(f"| {command} | {said} | {one.cpu:.2f} | {one.wall:.2f} |")
    return "\n".join(lines)


def first_step(folder: Path, repeats: int) -> tuple[float, float]:
    """Seconds of CPU and of wall time from `personalize edit` to the first denoising step, medians of `repeats`."""
    train = "train single_image photo.png --caption cat --config embedded --output_dir learned --quiet"
    shown = {"cwd": folder, "env": environment(), "check": True, "capture_output": True, "text": True}
    subprocess.run(
        [sys.executable, "-m", "personalize", *train.split(), f"--max_train_samples={SAMPLES}"],
        **shown,  # pyright: ignore[reportArgumentType, reportCallIssue]
    )
    cpu, wall = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        child = subprocess.run(
            [sys.executable, "-c", FIRST_STEP, "edit", "learned", "--prompt", "a dog"],
            **shown,  # pyright: ignore[reportArgumentType, reportCallIssue]
        )
        wall.append(time.perf_counter() - start)
        cpu.append(float(child.stdout.rpartition("first step")[2]))
    return median(cpu), median(wall)


def main(config: UserErrorsBench) -> None:
    """Print what was measured, and write the table."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_place(folder)
        if not config.edit:
            met = [meet(mistake, folder) for mistake in MISTAKES]
            write(met)
        cpu, wall = first_step(folder, config.repeats)
    line = f"{STEP} {cpu:.1f} s of CPU, {wall:.1f} s of wall time, of {config.repeats} starts."
    RESULTS.write_text(re.sub(f"{STEP} .*", line, RESULTS.read_text(encoding="utf-8")), encoding="utf-8")
    print(line)


def write(met: list[Met]) -> None:
    """Put the table in place of the one in the results, and print what misses the goal."""
    slow = [one for one in met if one.cpu > GOAL and not one.mistake.loads]
    odd = [one for one in met if one.code != 2 or one.mistake.says not in one.message]
    text = RESULTS.read_text(encoding="utf-8") if RESULTS.exists() else HEAD
    RESULTS.write_text(text.partition("| command |")[0] + table(met) + "\n", encoding="utf-8")
    print(f"{len(met)} mistakes; the slowest message took {max(one.cpu for one in met):.2f} s of CPU")
    for title, those in (("above the goal", slow), ("another code or message than expected", odd)):
        print(f"{title}: {', '.join(one.mistake.command for one in those) or 'none'}")


if __name__ == "__main__":
    main(tyro.cli(UserErrorsBench, use_underscores=True))
