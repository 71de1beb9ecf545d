"""One job at a time: a queue, one worker thread, and what every page shows of them.

A job is a function that gets its `Job` and reports through it.  All pages see the same queue, so that a second tab or a
reloaded page shows the job that runs.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Literal

from personalize.errors import UserError, first_line
from personalize.io.progress import Advance

State = Literal["waiting", "running", "done", "failed", "cancelled"]
KEPT = 200  # finished jobs of tabs whose results are kept


class Cancelled(BaseException):
    """Ends a job that its user has cancelled; no `except Exception` on the way keeps it."""


@dataclass
class Level:
    """A part of the work that is under way: how many of its steps were made, of which `before` in an earlier run."""

    name: str
    total: int
    finished: int
    before: int
    began: float


@dataclass(eq=False)
class Job:
    """A job, from the click to its result.

    kind: the tab it belongs to.  title: what it does, for people.  command: the command line that does the same.
    page: the page that alone waits for its result, if it is not shown by a tab; such a job is not kept.
    inputs: what the tab's fields held, to restore them.  result: what the tab shows; it may grow while the job runs.
    version: counts the changes, so that a page is drawn again only when there is something new.
    stopping: a training is to end early and keep what it has.  cancelling: the job is to end at its next step.
    """

    kind: str
    title: str
    work: Callable[[Job], Any]
    command: str = ""
    inputs: dict[str, Any] = field(default_factory=dict)
    page: str | None = None
    number: int = 0
    state: State = "waiting"
    result: Any = None
    error: str = ""
    version: int = 0
    began: float = 0.0
    seconds: float = 0.0
    stopping: bool = False
    cancelling: bool = False
    ended: threading.Event = field(default_factory=threading.Event)
    levels: list[Level] = field(default_factory=list)

    @contextmanager
    def part(self, name: str, steps: int, done: int = 0) -> Iterator[Advance]:
        """A part of the work; it has the form of a listener of `io.progress`.  Cancelled if the user wants no more."""
        level = Level(name, steps, done, done, time.monotonic())

        def advance(note: Callable[[], str] | None = None, /) -> None:
            level.finished += 1
            self.step()

        self.levels.append(level)
        try:
            self.step()
            yield advance
        finally:
            self.levels.remove(level)

    def step(self) -> None:
        """Something has changed.  Cancelled if the user wants no more."""
        if self.cancelling:
            raise Cancelled
        self.version += 1

    def show(self, result: Any) -> None:
        """What the tab shows from now on."""
        self.result = result
        self.version += 1

    @property
    def share(self) -> float:
        """What is done of the outermost part, 0 to 1; an inner part counts as a share of one step of the outer one."""
        share = 0.0
        for level in reversed(list(self.levels)):
            share = min(1.0, (level.finished + share) / level.total) if level.total else share
        return share

    @property
    def seconds_left(self) -> float | None:
        """The time that the rest of the outermost part will take, at its pace so far; None before there is one."""
        level = next(iter(self.levels), None)
        if level is None or not level.total:
            return None
        made = self.share * level.total - level.before
        return (time.monotonic() - level.began) / made * (1 - self.share) * level.total if made > 0 else None

    @property
    def over(self) -> bool:
        return self.state in ("done", "failed", "cancelled")


class JobQueue:
    """Jobs in the order of their arrival, carried out one after another by one thread."""

    def __init__(self) -> None:
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._numbers = count(1)
        self._ended: deque[Job] = deque(maxlen=KEPT)
        self.running: Job | None = None
        threading.Thread(target=self._work, daemon=True, name="studio").start()

    def submit(self, job: Job) -> Job:
        """Put `job` at the end of the queue; one of a page takes the place of that page's own of its kind that wait."""
        with self._changed:
            for other in self.waiting():
                if job.page is not None and (other.kind, other.page) == (job.kind, job.page):
                    self._waiting.remove(other)
                    self._end(other, "cancelled")
            job.number = next(self._numbers)
            self._waiting.append(job)
            self._changed.notify_all()
        return job

    def cancel(self, job: Job | None = None) -> None:
        """Take `job` out of the queue, or end it at its next step; by default the one that runs."""
        with self._changed:
            job = job or self.running
            if job in self._waiting:
                self._waiting.remove(job)
                self._end(job, "cancelled")
            elif job is not None:
                job.cancelling = True
                job.version += 1

    def cancel_waiting(self) -> None:
        """Take every job out of the queue that has not begun."""
        for job in self.waiting():
            self.cancel(job)

    def waiting(self) -> list[Job]:
        return list(self._waiting)

    def position(self, job: Job) -> int:
        """How many jobs are before this one: 0 for the one that runs."""
        waiting = self.waiting()
        return waiting.index(job) + (self.running is not None) if job in waiting else 0

    def latest(self, kind: str) -> Job | None:
        """The newest job of a tab that has begun."""
        if self.running is not None and self.running.kind == kind:
            return self.running
        return next((job for job in reversed(self._ended) if job.kind == kind and job.began), None)

    def history(self, kind: str) -> list[Job]:
        """The finished jobs of a tab, the newest first."""
        return [job for job in reversed(self._ended) if job.kind == kind and job.state == "done"]

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting)
                job = self.running = self._waiting.popleft()
            self._carry_out(job)

    def _carry_out(self, job: Job) -> None:
        job.state, job.began = "running", time.monotonic()
        state: State = "done"
        try:
            result = job.work(job)
            job.result = job.result if result is None else result
        except Cancelled:
            state = "cancelled"
        except UserError as error:
            state, job.error = "failed", str(error)
        except Exception as error:  # a fault of ours: one line for the page, all of it for the terminal
            traceback.print_exc(file=sys.stderr)
            reason = f"{type(error).__name__}: {first_line(error)}"
            state, job.error = "failed", f"this is a fault of the studio, {reason}"
        with self._changed:
            self.running = None
            job.seconds = time.monotonic() - job.began
            self._end(job, state)

    def _end(self, job: Job, state: State) -> None:
        job.state = state
        job.version += 1
        if job.page is None:
            self._ended.append(job)
        job.ended.set()
