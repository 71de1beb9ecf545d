"""Every exception that ends a command as one line and an exit code; `PERSONALIZE_TRACEBACK=1` shows its traceback.

1 is for a fault of the program and for memory that does not suffice, 2 for a mistake that the user can correct.
"""

from __future__ import annotations

import errno
import os
import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from personalize.errors import UserError

TRACEBACK = "PERSONALIZE_TRACEBACK"  # environment variable
PACKAGE = Path(__file__).parents[1]
USER_ERRNOS = {
    errno.ENOENT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EISDIR,
    errno.ENAMETOOLONG, errno.EEXIST,
}  # fmt: skip
NO_MEMORY = re.compile(  # what torch says on each device without an exception of its own
    r"out of memory|not enough memory|can't allocate memory|cannot allocate memory|_ALLOC_FAILED", re.IGNORECASE
)
ASKED = re.compile(r"tried to allocate ([\d.,]+ ?[KMGT]?i?B(?:ytes)?)|you tried to allocate (\d+) bytes", re.IGNORECASE)
LOWER = {  # options by which a command needs less memory, the most useful first: what to write
    "train_batch_size": "a smaller --train_batch_size (the update stays as large)",
    "gradient_checkpointing": "--gradient_checkpointing",
    "adapters_per_batch": "a smaller --adapters_per_batch",
    "resolution": "a smaller --resolution",
    "load_in_4bit": "--load_in_4bit",
    "num_images": "fewer --num_images",
    "height": "a smaller --height and --width",
    "mixed_precision": "--mixed_precision bf16",
    "batch_sizes": "smaller --batch_sizes",
}
AT_MOST = 4  # of them in one message


class OutOfMemory(UserError):
    """The memory did not suffice; the message says what to lower."""

    exit_code = 1


def traceback_wanted() -> bool:
    """Has the user asked for tracebacks?"""
    return os.environ.get(TRACEBACK, "0").lower() not in ("", "0", "false", "no")


def described(error: BaseException) -> tuple[str, int]:
    """The line that says what ended a command, and its exit code."""
    if isinstance(error, UserError):
        return str(error), error.exit_code
    if is_out_of_memory(error):
        return memory_line(error, {}), OutOfMemory.exit_code
    if isinstance(error, OSError) and error.errno in USER_ERRNOS:
        where = f": {error.filename}" if error.filename else ""
        return f"{(error.strerror or str(error)).lower()}{where}", UserError.exit_code
    said = " ".join(str(error).split())[:300]
    name = f"{type(error).__name__}: {said}" if said else type(error).__name__
    return f"a fault of the program{_place(error)}: {name} ({TRACEBACK}=1 shows the traceback, to be reported)", 1


def show_traceback(error: BaseException) -> None:
    """Print the traceback on stderr, if the user has asked for tracebacks."""
    if traceback_wanted():
        traceback.print_exception(error)
        if sys.stderr is not None:
            sys.stderr.flush()


def is_out_of_memory(error: BaseException | None) -> bool:
    """Is it Python's MemoryError, or what torch raises on any device, or was it raised for such a one?"""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        names = {kind.__name__ for kind in type(error).__mro__}
        if names & {"MemoryError", "OutOfMemoryError"} or getattr(error, "errno", None) == errno.ENOMEM:
            return True
        if isinstance(error, RuntimeError) and NO_MEMORY.search(str(error)):
            return True
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return False


def memory_line(error: BaseException, options: Mapping[str, Any]) -> str:
    """That the memory did not suffice, for how much, and which of the command's `options` to lower."""
    texts = [str(each) for each in (error, error.__cause__, error.__context__) if each is not None]
    asked = next((match for text in texts if (match := ASKED.search(text))), None)
    where = "the device" if any(re.search("cuda|hip|mps|xpu", text, re.IGNORECASE) for text in texts) else "the machine"
    amount = f" ({' '.join((asked[1] or f'{asked[2]} bytes').split())} more were asked for)" if asked else ""
    lower = [text for name, text in LOWER.items() if name in options][:AT_MOST]
    advice = f"try {', '.join(lower)}, or " if lower else ""
    return f"the memory of {where} did not suffice{amount}: {advice}free some by ending other programs"


@contextmanager
def memory_advised(options: Mapping[str, Any]) -> Iterator[None]:
    """Run the body of a command with these `options`; if memory does not suffice, OutOfMemory says which to lower."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error) and not isinstance(error, OutOfMemory):
            raise OutOfMemory(memory_line(error, options)) from error
        raise


def _place(error: BaseException) -> str:
    """Where in this package it was raised, as " in editing/editor.py, line 91"; empty if elsewhere."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(str(PACKAGE))]
    frames = [frame for frame in frames if Path(frame.filename).parent != PACKAGE / "cli"]  # which calls everything
    return (
        f" in {Path(frames[-1].filename).relative_to(PACKAGE).as_posix()}, line {frames[-1].lineno}" if frames else ""
    )
