"""An Accelerator that belongs to one run: on the model's own device, with accelerate's global state left unchanged."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState, GradientState

STATES: Sequence[Any] = (PartialState, AcceleratorState, GradientState)


def default_accelerator(device: torch.device) -> Accelerator:
    """The Accelerator of a run that was given none: in a launch of several processes theirs, else one of its own."""
    together = int(os.environ.get("WORLD_SIZE", "1")) > 1 or PartialState._shared_state.get("num_processes", 1) > 1
    return Accelerator() if together else OwnAccelerator(device)


class OwnAccelerator(Accelerator):
    """An Accelerator on `device` whose state is its own.

    Accelerate has one state for the whole process: the first Accelerator chooses device and precision for all others,
    which then move their modules there, or raise.
    """

    def __init__(self, device: torch.device) -> None:
        self._states: list[dict[str, Any]] = [{} for _ in STATES]
        with _shared(self._states):
            super().__init__(cpu=device.type == "cpu")
        for state in self._states[:2]:
            state["device"] = device

    def prepare(self, *args: Any, **kwargs: Any) -> Any:
        with _shared(self._states):
            return super().prepare(*args, **kwargs)

    @contextmanager
    def autocast(self, autocast_handler: Any = None) -> Iterator[None]:
        with _shared(self._states), super().autocast(autocast_handler):
            yield

    def wait_for_everyone(self) -> None:
        """There is nobody to wait for."""


@contextmanager
def _shared(states: Sequence[dict[str, Any]]) -> Iterator[None]:
    """Run the body with `states` as the process-wide state of Accelerate."""
    before = [kind._shared_state for kind in STATES]
    try:
        for kind, state in zip(STATES, states, strict=True):
            kind._shared_state = state
        yield
    finally:
        for kind, state in zip(STATES, before, strict=True):
            kind._shared_state = state
