"""A pytest plugin: the pretended device for one process, and fixtures that make models on it.

REHEARSAL_DEVICE: "cuda" (default) or "mps".  REHEARSAL_GPUS: how many, by default 2.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from tests.rehearsal.device import begin
from tests.rehearsal.record import RECORD, Record

KIND = os.environ.get("REHEARSAL_DEVICE", "cuda")
LIBRARY = begin(KIND, int(os.environ.get("REHEARSAL_GPUS", "2")) if KIND == "cuda" else 1)

import pytest  # noqa: E402
from accelerate.state import AcceleratorState, GradientState  # noqa: E402


@pytest.fixture(autouse=True)
def fresh_process() -> Iterator[None]:
    """Each flow begins as a process does: nothing recorded, no Accelerate state, the first device the current one."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    LIBRARY.pretended_set(0)
    RECORD.clear()
    yield
    RECORD.clear()


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Record:
    RECORD.flow = request.node.name.removeprefix("flow_")
    return RECORD


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """How often the host waited for the device in each further update or step, flow by flow."""
    if RECORD.counts:
        terminalreporter.section("waits for the device, for each further update or step")
    for flow, count in RECORD.counts.items():
        terminalreporter.write_line(f"{count:5g}  {flow}")


@pytest.fixture
def held() -> Any:
    """held(1): the bytes that tensors on the device number 1 have."""
    return LIBRARY.pretended_bytes
