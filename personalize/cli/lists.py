"""Options that take several values: after one flag or after several, before a command line is parsed."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from personalize.errors import UserError


def flag_name(token: str) -> str | None:
    """The name in a long option, `--train-batch-size=4` → "train_batch_size"; None for any other token."""
    match = re.match(r"--([A-Za-z][\w-]*)(=|$)", token)
    return match[1].replace("-", "_") if match else None


@dataclass
class _Sorted:
    """The tokens of a command line by what they are; `runs` are the list options in order, each with its values."""

    free: list[str] = field(default_factory=list)
    single: list[str] = field(default_factory=list)
    runs: list[tuple[str, list[str]]] = field(default_factory=list)


def gathered(
    args: Sequence[str], more: Sequence[str] = (), *, lists: Collection[str], switches: Collection[str],
    needs_argument: bool,
) -> list[str]:  # fmt: skip
    """The same command line with arguments without a flag first, and all values of a list option behind one flag.

    So `--swap a=b c=d` and `--swap a=b --swap c=d` are the same.  If the command `needs_argument` and none stands
    elsewhere, it is the last word of the last list: `edit --swap a=b photo.png --source x`.

    Args:
        more: tokens that follow and were not typed, but stand in a file: no word of theirs is the argument.
        lists: names of the options that take several values.
        switches: names of those that take none.

    Raises:
        UserError: a list option without a value, or with one that would be read as an option; or a file's name that
            would be.
    """
    for token in args:
        if re.match(r"-[^-\d.]", token) and os.path.lexists(token):
            raise UserError(f"{token} is a file whose name reads as an option: write ./{token}")
    tokens = _sorted(args, lists, switches)
    long = [values for _, values in tokens.runs if len(values) > 1]
    if needs_argument and not tokens.free and long:
        tokens.free.append(long[-1].pop())
    rest = _sorted(more, lists, switches)
    values: dict[str, list[str]] = {}
    for name, own in (*tokens.runs, *rest.runs):
        if not own:
            raise UserError(f"--{name} needs a value, got nothing")
        if odd := next((value for value in own if re.match(r"-[^\s\d.]", value)), None):
            raise UserError(f"--{name} has the value {odd!r}, which reads as an option: write it otherwise")
        values.setdefault(name, []).extend(own)
    single = [*tokens.free, *tokens.single, *rest.single]
    if needs_argument and not tokens.free:  # else tyro takes a list's value for it; so it says what is missing
        return single
    return [*single, *(token for name, own in values.items() for token in (f"--{name}", *own))]


def repeated(args: Sequence[str], *, lists: Collection[str], switches: Collection[str]) -> Iterator[str]:
    """A sentence for each option of one value that `args` give several, of which the last is taken."""
    given: dict[str, list[str]] = {}
    tokens = iter(_sorted(args, lists, switches).single)
    for token in tokens:
        name, equals, value = token.removeprefix("--").partition("=")
        if not equals and name.removeprefix("no_") in switches:
            name, value = name.removeprefix("no_"), token
        elif not equals:
            value = next(tokens, "")
        given.setdefault(name, []).append(value)
    for name, values in given.items():
        if len(set(values)) > 1:
            often = "twice" if len(values) == 2 else f"{len(values)} times"
            yield f"--{name} is given {often}: the last, {values[-1]}, is taken"


def check_said_once(option: str, pairs: Iterable[tuple[str, object]]) -> None:
    """UserError if a list option, such as --weight cat=2 cat=3, gives one word two values, of which one would count.

    pairs: the words and their values.
    """
    said: dict[str, object] = {}
    for word, value in pairs:
        if (first := said.setdefault(word.lower(), value)) != value:
            raise UserError(f"--{option} says two things about {word!r}, {first} and {value}: give one of them")


def _sorted(args: Sequence[str], lists: Collection[str], switches: Collection[str]) -> _Sorted:
    found, current, tokens = _Sorted(), None, iter(args)
    for token in tokens:
        name = flag_name(token)
        if name is None:
            (found.free if current is None else current).append(token)
        elif name in lists:
            current = [token.partition("=")[2]] if "=" in token else []
            found.runs.append((name, current))
        else:
            current = None
            found.single.append(token)
            if "=" not in token and name.removeprefix("no_") not in switches:
                found.single.extend(_value(tokens))
    return found


def _value(tokens: Iterator[str]) -> list[str]:
    """The next token, if there is one."""
    return [value for value in [next(tokens, None)] if value is not None]
