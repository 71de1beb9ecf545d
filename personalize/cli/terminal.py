"""What a command line prints: it never fails for its characters, and a Notice is one line."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from io import TextIOWrapper
from typing import TextIO

from personalize.errors import Notice


@contextmanager
def terminal() -> Iterator[None]:
    """Run the body with output that takes every character, and each Notice printed once, as one line on stderr.

    A character that the output's encoding lacks, as in a Latin-1 locale or in a file on Windows, is printed as its
    code: `\\u732b`.  In a launch of several processes, the first prints the notices.
    """
    with ExitStack() as stack:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, TextIOWrapper) and stream.errors == "strict":
                stream.reconfigure(errors="backslashreplace")
                stack.callback(stream.reconfigure, errors="strict")
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("always", Notice)
        show, printed = warnings.showwarning, set[str]()

        def show_notice(
            message: Warning | str, category: type[Warning], filename: str, lineno: int,
            file: TextIO | None = None, line: str | None = None,
        ) -> None:  # fmt: skip
            text = " ".join(str(message).split())
            if not issubclass(category, Notice):
                show(message, category, filename, lineno, file, line)
            elif text not in printed and os.environ.get("RANK", "0") == "0":
                printed.add(text)
                print(f"Note: {text}", file=sys.stderr)

        warnings.showwarning = show_notice
        yield
