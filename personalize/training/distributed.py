"""The processes of a distributed launch: what each is started with, and their work where each trains its own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import InitProcessGroupKwargs, parse_choice_from_env, parse_flag_from_env

from personalize.errors import UserError, first_line

JOINING = timedelta(hours=1)  # how long a process waits until all have started
TIMEOUT = timedelta(days=30)  # how long it then may wait for the slowest one
SHARDING = {  # what `accelerate launch` may be set to, by the variable that it sets
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed", "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}  # fmt: skip
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


def check_launcher() -> None:
    """UserError if `accelerate launch` is to divide the model among its processes: here each has the whole base."""
    for variable, name in SHARDING.items():
        if parse_flag_from_env(variable):
            raise UserError(
                f"accelerate launch is set to {name}, which divides a model among processes, and here each has the "
                "whole base: give it another --config_file, e.g. configs/accelerate/2_gpu.yaml"
            )


def accelerator_of(precision: str | None, **settings: Any) -> Accelerator:
    """An Accelerator of the mixed `precision`, if None that of `accelerate launch`, with these further `settings`.

    Raises:
        UserError: the precision does not work here, the launcher is set to divide the model, or a process is missing.
    """
    check_launcher()
    waits = InitProcessGroupKwargs(timeout=JOINING)
    with _all_joined():
        try:
            accelerator = Accelerator(mixed_precision=precision, kwargs_handlers=[waits], **settings)
        except ValueError as error:  # e.g. bf16 on an old GPU, fp8 without a package for it
            asked = precision or parse_choice_from_env("ACCELERATE_MIXED_PRECISION", "no")
            raise UserError(f"--mixed_precision {asked} does not work here: {error}") from None
        _wait_long(accelerator)
    return accelerator


@contextmanager
def _all_joined() -> Iterator[None]:
    """Run the body, which joins the processes of the launch; UserError if they cannot be, or one has not started."""
    try:
        yield
    except torch.distributed.DistError as error:  # the time is over, or the port is taken
        raise UserError(
            f"the processes of this launch did not come together within {JOINING.total_seconds() / 60:g} minutes "
            f"({first_line(error)}): see what each has said, on its machine"
        ) from error


def _wait_long(state: Any) -> None:
    """Wait until all processes are there; from then on each waits for the slowest one, e.g. while it draws pictures."""
    if state.num_processes > 1:
        state.wait_for_everyone()
        torch.distributed.distributed_c10d._set_pg_timeout(TIMEOUT)


def join_process_group() -> ProcessGroup:
    """Connect to the other processes of this launch, on one machine or several, but let Accelerate train in one alone.

    Accelerate makes the process group and picks the device.  An `Accelerator` made afterwards belongs to a run of one
    process, so that every process can train adapters of its own.

    Raises:
        UserError: the launcher is set to divide the model, or a process is missing.
    """
    check_launcher()
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or torch.accelerator.device_count() == 0
    with _all_joined():
        state = PartialState(cpu=cpu, timeout=JOINING)
        _wait_long(state)
    group = ProcessGroup(state.process_index, state.num_processes)
    if group.count > 1:
        AcceleratorState._reset_state(reset_partial_state=True)  # torch's process group stays
        GradientState._reset_state()
        for name in LAUNCH_VARIABLES:
            os.environ.pop(name, None)
    return group
