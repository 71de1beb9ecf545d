"""How far the work is: bars on a terminal, a line each half-minute in a log, nothing with `--quiet`."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.file_proxy import FileProxy
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from personalize.cli.terminal import PlainConsole, make_visible, visible
from personalize.io.progress import Advance, heard, listening

LINE_EVERY = 30.0  # seconds between two lines in a log
NOTE_EVERY = 0.5  # seconds between two notes on a bar: to compute one may wait for the device


@contextmanager
def progress(*, quiet: bool = False, console: Console | None = None) -> Iterator[None]:
    """Say how far every long part of the body is, on stderr, with the time left.

    Whoever listens already, as the studio does, goes on listening in place of the bars.  In a launch of several
    processes the first one speaks.
    """
    if quiet or heard() or os.environ.get("RANK", "0") != "0":
        yield
        return
    console = console or PlainConsole(stderr=True)
    display = Bars(console) if console.is_terminal else Lines(console)
    try:
        with listening(display.part):
            yield
    finally:
        display.close()


class Bars:
    """A bar for every part that is under way, below what is printed meanwhile; none if there is just one step."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bars: Progress | None = None

    @contextmanager
    def part(self, name: str, steps: int, done: int) -> Iterator[Advance]:
        """A part of `steps` steps begins, of which `done` were made before."""
        if steps == 1:
            yield _ignored
            return
        outermost, noted = self.bars is None, 0.0
        if self.bars is None:
            self.bars = self._new()
            self.bars.start()
            for output in ("stdout", "stderr"):  # rich prints above the bars, and would obey codes in what it is given
                if isinstance(getattr(sys, output), FileProxy):
                    make_visible(output)
        bars = self.bars
        task = bars.add_task(visible(name), total=steps or None, completed=done, note="")

        def advance(note: Callable[[], str] | None = None, /) -> None:
            nonlocal noted
            bars.advance(task)
            if note is not None and time.monotonic() - noted >= NOTE_EVERY:
                noted = time.monotonic()
                bars.update(task, note=visible(note()))

        try:
            yield advance
        finally:
            bars.refresh()
            bars.remove_task(task)
            if outermost:
                self.close()

    def close(self) -> None:
        """Take the bars away; the loops that an error has ended may still be open, and their bars with them."""
        if self.bars is not None:
            self.bars.stop()
            self.bars = None

    def _new(self) -> Progress:
        columns = (
            TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
        )  # fmt: skip
        # what is printed appears above the bars; output that goes into a file is left to go there
        return Progress(*columns, console=self.console, transient=True, redirect_stdout=sys.stdout.isatty())


@dataclass
class _Part:
    """A part that is under way: `done` of `steps`, of them `before` already when it began."""

    name: str
    steps: int
    done: int
    before: int
    began: float = field(default_factory=lambda: time.monotonic())

    def __str__(self) -> str:
        return f"{self.name}: {self.done} of {self.steps}" if self.steps else f"{self.name}: {self.done}"

    def left(self) -> str:
        """About how long the rest will take, in words; nothing before the first step."""
        made, rest = self.done - self.before, self.steps - self.done
        if made < 1 or rest < 1:
            return ""
        return f"about {duration((time.monotonic() - self.began) / made * rest)} left"


class Lines:
    """A line at most each half-minute: the outermost part and its time left, and the innermost in brackets."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.parts: list[_Part] = []
        self.last = time.monotonic()

    @contextmanager
    def part(self, name: str, steps: int, done: int) -> Iterator[Advance]:
        """A part of `steps` steps begins, of which `done` were made before."""
        if steps == 1:
            yield _ignored
            return
        own = _Part(name, steps, done, done)
        self.parts.append(own)

        def advance(note: Callable[[], str] | None = None, /) -> None:
            own.done += 1
            if time.monotonic() - self.last >= LINE_EVERY:
                self.last = time.monotonic()
                self._print(note() if note is not None else "")

        try:
            yield advance
        finally:
            self.parts.remove(own)

    def close(self) -> None:
        """Nothing is left to take away."""

    def _print(self, note: str) -> None:
        first, *inner = self.parts
        text = ", ".join(filter(None, [str(first), first.left(), "" if inner else note]))
        if inner:
            text += f" ({', '.join(filter(None, [str(inner[-1]), inner[-1].left(), note]))})"
        print(visible(text), file=self.console.file, flush=True)


def _ignored(note: Callable[[], str] | None = None, /) -> None:
    """The progress of a part that is not shown."""


def duration(seconds: float) -> str:
    """`seconds` in the words one would use: 40 s, 12 min, 2 h 5 min."""
    if seconds < 60:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
