"""The part of the speed bench about keeping freed memory instead of returning it to the system.

Each group runs in a process of its own, because memory that was kept once is not returned later.
"""

from __future__ import annotations

import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import TYPE_CHECKING

import torch

from tests.bench.speed.arms import facts, ratio, spread
from tests.bench.speed.setup import Rows, model_of, run_of, stepper

if TYPE_CHECKING:
    from tests.bench.speed.bench import SpeedBench

ARMS = {"memory given back": False, "memory kept": True}


def kept(bench: SpeedBench) -> Rows:
    """Milliseconds of an update on the CPU with either setting; one process for each group and arm."""
    if torch.cuda.is_available():
        raise NotImplementedError("freed memory is glibc's business on a CPU alone")
    times: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for group in range(bench.groups):
        for arm in ARMS if group % 2 == 0 else reversed(ARMS):
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                times[arm].append(process.submit(update, bench, ARMS[arm], torch.get_num_threads()).result())
    first, *_ = times.values()
    common = facts(torch.device("cpu")) | {"part": "freed memory", "clock": "wall", "groups": bench.groups}
    common |= {"calls": bench.calls, "warmup": 1, "ratio_to": next(iter(ARMS)), "batch": bench.batch}
    return [common | {"arm": arm, **spread(values), **ratio(first, values)} for arm, values in times.items()]


def update(bench: SpeedBench, keep: bool, threads: int) -> float:
    """Milliseconds of an update: the mean of `bench.calls`, after one that warms up."""
    torch.set_num_threads(threads)
    with run_of(model_of(bench), bench.batch, bench.rank, bench.latent, keep=keep) as run:
        step = stepper(run)
        step()
        start = time.perf_counter()
        for _ in range(bench.calls):
            step()
        return 1e3 * (time.perf_counter() - start) / bench.calls
