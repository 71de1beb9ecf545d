"""The exceptions that the command line shows to the user as one line instead of a traceback."""

import os
import shlex
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from subprocess import list2cmdline


class UserError(ValueError):
    """An error that the user can correct; its message is one line: what arrived, what was expected, what to do.

    The command line prints it as `personalize: <message>` and exits with `exit_code`, without a traceback.
    """

    exit_code = 2


class NonFiniteLatents(UserError):
    """A picture cannot be decoded, because sampling overflowed."""


class Mismatch(UserError):
    """A command that checks something could read it and found it wrong, as `personalize verify` may."""

    exit_code = 1


class Stopped(KeyboardInterrupt):
    """The signal `number` has ended the work; the command line prints the message, if there is one, in one line."""

    def __init__(self, number: int, message: str = "") -> None:
        super().__init__(message)
        self.exit_code = 128 + number


@contextmanager
def said_if_stopped(message: str | Callable[[], str]) -> Iterator[None]:
    """Run the body; an interrupt or a signal that ends it says `message` in one line, unless it has one already.

    message: what was kept, and how to go on; a function is called only then.
    """
    try:
        yield
    except KeyboardInterrupt as stop:
        if not str(stop):
            stop.args = (message if isinstance(message, str) else message(),)
        raise


class Notice(UserWarning):
    """Something that the user should know although the work goes on; the command line prints it as one line."""


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or the name of its type if it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def typed(*words: object) -> str:
    """`words` as a command line, for a message: those with spaces and the like in quotes, as a shell wants them."""
    texts = [str(word) for word in words]
    return list2cmdline(texts) if os.name == "nt" else shlex.join(texts)


def nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    """The end of an error message: the names of `known` that are similar to `name`, or all of them if they are few."""
    known = sorted(known)
    near = get_close_matches(name, known, n=3, cutoff=0.6)
    if near:
        return f"did you mean {' or '.join(prefix + word for word in near)}?"
    return f"choose one of {', '.join(prefix + word for word in known)}" if len(known) <= 12 else "see --help"
