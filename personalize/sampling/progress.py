"""Progress of the long parts of a computation, reported to a listener if there is one.

Loops over steps pass through `ticked`; `part` names what they do. A listener, such as a progress bar, is set for the
length of `listening`; without one nothing happens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol, TypeVar

ItemT = TypeVar("ItemT", covariant=True)
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


def heard() -> bool:
    """Does somebody listen already?"""
    return _LISTENER.get() is not None


@contextmanager
def part(name: str) -> Iterator[None]:
    """Call the loops in the body `name`, unless an inner part has another name."""
    token = _PART.set(name)
    try:
        yield
    finally:
        _PART.reset(token)


class Steps(Protocol[ItemT]):
    """Items that can be counted and gone through: a tuple, a list, a `Schedule`."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[ItemT]: ...


def ticked(steps: Steps[ItemT]) -> Iterator[ItemT]:
    """The items of `steps`; the listener hears of each that is finished."""
    listener = _LISTENER.get()
    advance = None if listener is None else listener(_PART.get(), len(steps))
    for step in steps:
        yield step
        if advance is not None:
            advance()
