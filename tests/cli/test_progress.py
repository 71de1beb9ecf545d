"""Bars on a terminal, and nothing elsewhere."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from personalize.cli.progress import progress_bars
from personalize.sampling.progress import part, ticked


@pytest.mark.parametrize("terminal", [True, False])
def test_bars_are_for_terminals_alone(terminal):
    stream = StringIO()
    with progress_bars(Console(file=stream, force_terminal=terminal, width=80)), part("Inverting"):
        assert list(ticked(range(3))) == [0, 1, 2]
    assert ("Inverting" in stream.getvalue()) is terminal and ("3/3" in stream.getvalue()) is terminal
