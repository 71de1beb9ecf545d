"""Messages about options in the words of a command line: `--rank`, not `rank`, and what was expected in its place."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, get_args, get_origin

from personalize.errors import UserError

KINDS = {int: "whole number", float: "number"}


@contextmanager
def worded(hints: Mapping[str, Any]) -> Iterator[None]:
    """Run the body; a UserError in it names the options, whose types are `hints`, as they are written."""
    try:
        yield
    except UserError as error:
        error.args = (as_options(str(error), hints),)
        raise


def as_options(message: str, names: Mapping[str, Any]) -> str:
    """`message` with `--` before every option's name: those of several words, and one that it begins with."""
    for name in sorted(names, key=len, reverse=True):
        if "_" in name:
            message = re.sub(rf"(?<![\w\-'\"/.<]){name}(?![\w=/'\"])(?!\.\w)", f"--{name}", message)
    first = message.partition(" ")[0]
    return f"--{message}" if first in names and re.match(r"\w+ (is|must) ", message) else message


def of_tyro(text: str, hints: Mapping[str, Any]) -> str:
    """tyro's message about a wrong value, said as all others are: what arrived, and what was expected."""
    if match := re.match(r"Error parsing --(\w+): .*?(?:\[(.*)\]|('[^']*'))$", text):
        name, value = match[1], match[2] or match[3]
        return f"--{name} is {value.replace(chr(39), '')!r}, expected {_expected(hints.get(name))}"
    if match := re.match(r"invalid choice '(.*)' for argument '--(\w+)'\. Expected one of \((.*)\)", text):
        choices = [choice.strip(" '") for choice in match[3].split(",") if choice.strip()]
        return f"--{match[2]} is {match[1]!r}: choose one of {', '.join(choices)}"
    if match := re.match(r"Missing value for argument '(?:\(')?--(\w+)", text):  # tyro 1.0.13 and older: '('--rank',)'
        return f"--{match[1]} needs a value, got nothing"
    if match := re.match(r"Unrecognized options: (.*)", text):
        return f"{match[1]} is more than the command takes: put words that belong together in quotes"
    return re.sub(r"^Error parsing \w+: ", "", text)  # an option's own check has said what is wrong


def _expected(hint: Any) -> str:
    """The type of an option in words."""
    several = get_origin(hint) is tuple
    kinds = [KINDS[kind] for kind in (hint, *get_args(hint)) if kind in KINDS]
    if not kinds:
        return "another value"
    example = "1 2 3" if kinds[0] == KINDS[int] else "0.8 1"
    return f"{kinds[0]}s with spaces between them, such as {example}" if several else f"a {kinds[0]}"
