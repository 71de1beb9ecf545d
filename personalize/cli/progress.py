"""A progress bar with the time left, on a terminal alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from personalize.sampling.progress import heard, listening


@contextmanager
def progress_bars(console: Console | None = None) -> Iterator[None]:
    """Show a bar for every long part of the body while it runs; nothing if stderr is not a terminal.

    Whoever listens already, as the studio does, goes on listening in place of the bars.
    """
    console = console or Console(stderr=True)
    if not console.is_terminal or heard():
        yield
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bars:

        def begin(name: str, steps: int) -> Callable[[], None]:
            task = bars.add_task(name, total=steps)
            return lambda: bars.advance(task)

        with listening(begin):
            yield
