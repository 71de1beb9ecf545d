"""The processes of a launch as a team of singles: they share out work, and each trains by itself."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import parse_flag_from_env

PATIENCE = timedelta(days=30)  # between the first process that has done its share and the last
LAUNCH = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
ValueT = TypeVar("ValueT")


@dataclass(frozen=True)
class ProcessGroup:
    """This process's number among `count`."""

    index: int = 0
    count: int = 1

    def gathered(self, value: ValueT) -> list[ValueT]:
        """Every process's `value`, on all of them, once all have come here."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(values, value)
        return values


def join() -> ProcessGroup:
    """Meet the other processes of this launch (of one machine or several), then let Accelerate see this one alone.

    Accelerate's launch makes the process group and picks the device; afterwards an `Accelerator` made here belongs to
    a run of one process, which is what lets every process train adapters of its own.
    """
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or torch.accelerator.device_count() == 0
    state = PartialState(cpu=cpu, timeout=PATIENCE)
    team = ProcessGroup(state.process_index, state.num_processes)
    if team.count > 1:
        AcceleratorState._reset_state(reset_partial_state=True)  # the process group stays
        GradientState._reset_state()
        for name in LAUNCH:
            os.environ.pop(name, None)
    return team
