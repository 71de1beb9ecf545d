"""Progress of the long parts of a computation, told to a listener if there is one.

Loops over steps pass through `ticked`; `part` names what they do. A listener, such as a progress bar, is set for the
length of `listening`; without one nothing happens.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

ItemT = TypeVar("ItemT")
Listener = Callable[[str, int], Callable[[], None]]  # (name of a part, its number of steps) → called after each step

_LISTENER: ContextVar[Listener | None] = ContextVar("listener", default=None)
_PART: ContextVar[str] = ContextVar("part", default="Sampling")


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Tell `listener` the progress of all loops in the body."""
    token = _LISTENER.set(listener)
    try:
        yield
    finally:
        _LISTENER.reset(token)


@contextmanager
def part(name: str) -> Iterator[None]:
    """Call the loops in the body `name`, unless an inner part has another name."""
    token = _PART.set(name)
    try:
        yield
    finally:
        _PART.reset(token)


def ticked(steps: Collection[ItemT]) -> Iterator[ItemT]:
    """The items of `steps`; the listener is told of each that is finished."""
    listener = _LISTENER.get()
    advance = None if listener is None else listener(_PART.get(), len(steps))
    for step in steps:
        yield step
        if advance is not None:
            advance()
