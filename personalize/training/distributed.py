"""The processes of a distributed launch, when each trains adapters of its own and they only divide the work."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import parse_flag_from_env

TIMEOUT = timedelta(days=30)  # how long a process may wait for the slowest one
LAUNCH_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
ValueT = TypeVar("ValueT")


@dataclass(frozen=True)
class ProcessGroup:
    """This process's `index` among the `count` processes of the launch."""

    index: int = 0
    count: int = 1

    def all_gather(self, value: ValueT) -> list[ValueT]:
        """The `value` of every process, in their order; waits until all processes have called this."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(values, value)
        return values


def join_process_group() -> ProcessGroup:
    """Connect to the other processes of this launch, on one machine or several, but let Accelerate train in one alone.

    Accelerate makes the process group and picks the device.  An `Accelerator` made afterwards belongs to a run of one
    process, so that every process can train adapters of its own.
    """
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or torch.accelerator.device_count() == 0
    state = PartialState(cpu=cpu, timeout=TIMEOUT)
    group = ProcessGroup(state.process_index, state.num_processes)
    if group.count > 1:
        AcceleratorState._reset_state(reset_partial_state=True)  # torch's process group stays
        GradientState._reset_state()
        for name in LAUNCH_VARIABLES:
            os.environ.pop(name, None)
    return group
