"""Timing of several ways to do the same work ("arms"): interleaved in one process, reported as ratios with intervals.

The arms take turns in alternating order (A B B A …), so that a machine that becomes slower or faster affects all of
them alike.  A group is a few calls of one arm; ratios are taken group by group, and their median is reported with a
bootstrap interval.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

RESAMPLES = 2000
FOREIGN_LIMIT = 0.5  # cores; a thread that loses its core makes all others wait at OpenMP's next barrier
LIBRARIES = ("torch", "diffusers", "peft", "accelerate")


@dataclass(frozen=True)
class Arm:
    """One way to do the work.

    run: one call of it.
    state: a context that is entered around each group; entering and leaving it is not timed.
    facts: further entries of its row in the results.
    """

    name: str
    run: Callable[[], Any]
    state: Callable[[], AbstractContextManager[Any]] = nullcontext
    facts: dict[str, Any] = field(default_factory=dict)


def measure(
    part: str,
    arms: Sequence[Arm],
    *,
    groups: int,
    calls: int = 1,
    warmup: int = 1,
    clock: str = "wall",
    device: torch.device | None = None,
    per: float = 1.0,
    seconds: float | None = None,
) -> list[dict[str, Any]]:
    """Time all arms; returns a row for each, with its ratio to the first arm (above 1: faster than the first).

    clock: "wall", or "cpu" for this process's CPU time, on machines where something else runs.
    per: the reported milliseconds are those of one call divided by this.
    seconds: once this time has passed, no further group begins; there are at least two.
    """
    device = device or torch.device("cpu")
    times: dict[str, list[float]] = {arm.name: [] for arm in arms}
    peaks: dict[str, int] = {}
    for arm in arms:
        with arm.state():
            for _ in range(warmup):
                arm.run()
    began = time.perf_counter()
    for group in range(groups):
        if seconds is not None and group > 1 and time.perf_counter() - began > seconds:
            groups = group
            break
        for arm in arms if group % 2 == 0 else arms[::-1]:
            with arm.state():
                if warmup:
                    arm.run()  # fills the caches that another arm has used
                elapsed, peaks[arm.name] = _timed(arm.run, calls, clock, device)
            times[arm.name].append(1e3 * elapsed / calls / per)
    first = times[arms[0].name]
    rows = []
    for arm in arms:
        row = {"part": part, "arm": arm.name, **facts(device), **spread(times[arm.name]), "clock": clock}
        row |= {"groups": groups, "calls": calls, "warmup": warmup, **ratio(first, times[arm.name])}
        row |= {"ratio_to": arms[0].name, **({"gb_alloc": peaks[arm.name] / 1e9} if device.type == "cuda" else {})}
        rows.append(row | arm.facts)
    return rows


def _timed(run: Callable[[], Any], calls: int, clock: str, device: torch.device) -> tuple[float, int]:
    """Seconds of `calls` calls, and the peak of allocated bytes on an accelerator."""
    read = time.process_time if clock == "cpu" else time.perf_counter
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    start = read()
    for _ in range(calls):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return read() - start, torch.cuda.max_memory_allocated() if device.type == "cuda" else 0


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and 10 % and 90 % quantiles, as entries of a row."""
    low, middle, high = np.quantile(values, [0.1, 0.5, 0.9])
    return {"ms_median": float(middle), "ms_p10": float(low), "ms_p90": float(high)}


def ratio(reference: Sequence[float], values: Sequence[float]) -> dict[str, Any]:
    """Median over groups of reference / value, with its 95 % bootstrap interval."""
    ratios = np.asarray(reference) / np.asarray(values)
    rng = np.random.default_rng(len(ratios))
    draws = np.median(ratios[rng.integers(0, len(ratios), (RESAMPLES, len(ratios)))], 1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return {"ratio": float(np.median(ratios)), "ratio_ci95": [float(low), float(high)]}


def exponent(sizes: Sequence[float], times: Sequence[float]) -> float:
    """The exponent p of the power law time ∝ size^p: the slope of log time over log size."""
    return float(np.polyfit(np.log(sizes), np.log(times), 1)[0])


def facts(device: torch.device) -> dict[str, Any]:
    """The machine, versions and commit with which a row was measured."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    cuda = device.type == "cuda"
    return {
        "schema": 1, "when": time.strftime("%Y-%m-%dT%H:%M:%S"), "commit": commit.stdout.strip(),
        "device": torch.cuda.get_device_name(device) if cuda else f"cpu, {torch.get_num_threads()} threads",
        "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version() if cuda else None,
        **{name: version(name) for name in LIBRARIES}, "load_average": os.getloadavg()[0],
    }  # fmt: skip


def foreign_load(seconds: float = 1.0) -> float:
    """How many cores other processes keep busy while this one sleeps for `seconds`."""
    busy_before, total_before = _jiffies()
    time.sleep(seconds)
    busy, total = _jiffies()
    return (busy - busy_before) / max(1, total - total_before) * (os.cpu_count() or 1)


def _jiffies() -> tuple[int, int]:
    """(busy, total) jiffies of all cores since the machine was started."""
    numbers = [int(word) for word in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
    return sum(numbers) - numbers[3] - numbers[4], sum(numbers)


def refuse_if_busy(force: bool) -> float:
    """The load of other processes, in cores; SystemExit if it is above half a core, unless `force`."""
    load = foreign_load()
    if load > FOREIGN_LIMIT and not force:
        raise SystemExit(f"{load:.1f} cores are busy with something else: wait, or measure anyway with --force")
    return load


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = ["| part | arm | ms median [p10, p90] | ratio [95 %] | to |", "|---|---|---|---|---|"]
    for row in rows:
        low, high = row["ratio_ci95"]
        times = f"{row['ms_median']:.1f} [{row['ms_p10']:.1f}, {row['ms_p90']:.1f}]"
        gain = f"{row['ratio']:.3f} [{low:.3f}, {high:.3f}]"
        lines.append(f"| {row['part']} | {row['arm']} | {times} | {gain} | {row['ratio_to']} |")
    return "\n".join(lines) + "\n"
