"""What a command line prints: control characters are shown as codes, no character fails, and a Notice is one line."""

from __future__ import annotations

import json
import os
import re
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from io import TextIOWrapper
from typing import Any, TextIO, cast

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from personalize.errors import Notice
from personalize.io.json_files import finite_values

# Characters that no one sees and that change how a line is shown: controls without tab and newline, marks of the
# direction of writing, separators, tags, and halves of surrogate pairs, which stand for bytes that are no text.
HIDDEN = re.compile(
    "[\0-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e0fff]"
)
UP = re.compile(r"(\x1b\[A)+")  # as a bar of tqdm goes back to the line it began on


def visible(text: str) -> str:
    """`text` with control characters as their codes, such as `\\x1b` and `\\r`; tabs and newlines stay."""
    return HIDDEN.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def json_text(value: Any) -> str:
    """`finite_values` as JSON to be printed: characters that would be shown as codes are escaped as JSON has it."""
    value = finite_values(value)
    text = json.dumps(value, indent=2, ensure_ascii=False)
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return json.dumps(value, indent=2)
    return json.dumps(value, indent=2) if HIDDEN.search(text) else text


class VisibleStream:
    """A text stream that shows control characters as codes, whoever writes; else it is the stream beneath.

    Bars of other libraries may go back to the beginning of their own line, and up from it: a carriage return is passed
    on if it begins what is written to a line that is empty or a bar.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._line_free, self._is_bar = True, False

    def write(self, text: str) -> int:
        """Write the visible form of `text`; returns how many of its characters were written: all."""
        is_bar = self._line_free and text.startswith("\r")
        if is_bar:
            end = len(text) if not text.strip("\r ") else 1
            self._stream.write(text[:end] + visible(text[end:]))
        elif self._is_bar and UP.fullmatch(text):
            self._stream.write(text)
        else:
            self._stream.write(visible(text))
        if text:
            self._is_bar = is_bar
            self._line_free = is_bar or text.endswith("\n")
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write each of `lines`."""
        for line in lines:
            self.write(line)

    @property
    def rich_proxied_file(self) -> TextIO:
        """The stream beneath, to which consoles of rich write their own codes."""
        return unwrapped(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class PlainConsole(Console):
    """rich's console for texts of others: no markup, no emoji names, control characters as codes."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(markup=False, emoji=False, **settings)

    def render_str(self, text: str, **settings: Any) -> Text:
        """rich's text of `text` in its visible form; rich itself would leave some of the characters out."""
        return super().render_str(visible(text), **settings)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """rich's segments, whose text is visible; its own movements of the cursor stay."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)


def unwrapped(stream: TextIO) -> TextIO:
    """The stream beneath those that pass on what is written to them."""
    while (beneath := getattr(stream, "rich_proxied_file", None)) is not None:
        stream = beneath
    return stream


def make_visible(name: str) -> VisibleStream | None:
    """Put a VisibleStream in the place of `sys.<name>`, "stdout" or "stderr"; None if there is one, or no output."""
    stream = getattr(sys, name)
    if stream is None or isinstance(stream, VisibleStream):
        return None
    wrapper = VisibleStream(stream)
    setattr(sys, name, cast(TextIO, wrapper))
    return wrapper


@contextmanager
def terminal() -> Iterator[None]:
    """Run the body with visible output that takes every character, and each Notice printed once, as one line on stderr.

    A character that the output's encoding lacks, as in a Latin-1 locale or in a file on Windows, is printed as its
    code: `\\u732b`.  In a launch of several processes, the first prints the notices.
    """
    with ExitStack() as stack:
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if isinstance(stream, TextIOWrapper) and stream.errors == "strict":
                stream.reconfigure(errors="backslashreplace")
                stack.callback(stream.reconfigure, errors="strict")
            if (wrapper := make_visible(name)) is not None:
                stack.callback(_restore, name, wrapper, stream)
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


def _restore(name: str, wrapper: VisibleStream, stream: TextIO) -> None:
    if getattr(sys, name) is wrapper:
        setattr(sys, name, stream)


def give_up_unwritable() -> None:
    """Write what output has kept back; of a stream that cannot, as when its reader has gone, the rest goes nowhere.

    Otherwise Python would fail for it once more when it ends.
    """
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
