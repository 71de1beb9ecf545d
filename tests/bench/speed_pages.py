"""What it gains to keep freed memory: updates in processes of their own, for what is kept once is not given back."""

from __future__ import annotations

import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import TYPE_CHECKING

import torch

from tests.bench.arms import facts, ratio, spread
from tests.bench.speed_setup import Rows, model_of, run_of, stepper

if TYPE_CHECKING:
    from tests.bench.speed import SpeedBench

ARMS = {"memory given back": False, "memory kept": True}


def kept(bench: SpeedBench) -> Rows:
    """Milliseconds of an update, in one process a group and arm; of a CPU alone."""
    if torch.cuda.is_available():
        raise NotImplementedError("it is a CPU's memory that glibc gives back")
    times: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for group in range(bench.groups):
        for arm in ARMS if group % 2 == 0 else reversed(ARMS):
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                times[arm].append(process.submit(update, bench, ARMS[arm], torch.get_num_threads()).result())
    first, *_ = times.values()
    common = facts(torch.device("cpu")) | {"part": "freed memory", "clock": "wall", "groups": bench.groups}
    common |= {"calls": bench.calls, "warmup": 1, "ratio_to": next(iter(ARMS)), "batch": bench.batch}
    return [common | {"arm": arm, **spread(found), **ratio(first, found)} for arm, found in times.items()]


def update(bench: SpeedBench, keep: bool, threads: int) -> float:
    """Milliseconds of one of `bench.calls` updates, after one to warm up."""
    torch.set_num_threads(threads)
    with run_of(model_of(bench), bench.batch, bench.rank, bench.latent, keep=keep) as run:
        step = stepper(run)
        step()
        start = time.perf_counter()
        for _ in range(bench.calls):
            step()
        return 1e3 * (time.perf_counter() - start) / bench.calls
