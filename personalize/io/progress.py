"""Progress of the long parts of a computation, reported to a listener if there is one.

Loops pass through `ticked`; `part` names what they do.  A listener, such as a progress bar, is set for the length of
`listening`; without one nothing happens.  What a listener raises, such as a cancellation, ends the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Protocol, TypeVar

ItemT = TypeVar("ItemT")


class Advance(Protocol):
    """Called after each step; `note()` is what a line about it may add, and is called only if it is shown."""

    def __call__(self, note: Callable[[], str] | None = None, /) -> None: ...


# Called with the name of a part, the number of its steps, and how many of them were made before; open to the part's end
Listener = Callable[[str, int, int], AbstractContextManager[Advance]]

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


def ticked(
    items: Iterable[ItemT],
    name: str | None = None,
    *,
    total: int | None = None,
    done: int = 0,
    note: Callable[[ItemT], str] | None = None,
) -> Iterator[ItemT]:
    """The items; the listener hears of each that is finished, when the next one is asked for.

    Args:
        name: of this part of the work; by default that of `part`.
        total: how many items there will be in all, with those `done` before; by default the length of `items`.
        note: more about the item just finished, such as a loss; computed only if it is shown.
    """
    listener = _LISTENER.get()
    if listener is None:
        yield from items
        return
    if total is None:
        total = done + (len(items) if isinstance(items, Sized) else 0)
    with listener(name or _PART.get(), total, done) as advance:
        for item in items:
            yield item
            advance(None if note is None else lambda item=item: note(item))
