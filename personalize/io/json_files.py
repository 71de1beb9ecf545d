"""Read JSON that others have written: it is parsed with limits, and its types and ranges are checked by a schema.

What is written for others to read has no number that JSON does not know.

A schema is a class of msgspec, whose `convert` names the place of the first value that does not fit.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from personalize.errors import UserError
from personalize.io.plain_files import read_bytes

MAX_JSON_BYTES = 16 * 2**20
MAX_DEPTH = 64  # of lists and objects in one another
MAX_DIGITS = 400  # of a whole number
SURROGATE = re.compile("[\ud800-\udfff]")  # half of a pair: no text, and no encoding can write it
MAY_HOLD_SURROGATES = re.compile(rb"\\u[dD]")
Kind = TypeVar("Kind")


def utf8(text: str) -> bytes:
    """`text` in UTF-8; halves of surrogate pairs, which stand for bytes of names that are no text, become U+FFFD."""
    return SURROGATE.sub("\ufffd", text).encode()


def finite_values(value: Any) -> Any:
    """`value` with None, in JSON null, for each number that is infinite or none: JSON has no words for these."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite_values(item) for key, item in value.items()}
    return [finite_values(item) for item in value] if isinstance(value, list | tuple) else value


def json_bytes(value: Any, *, ensure_ascii: bool = True) -> bytes:
    """The contents of a JSON file that holds the `finite_values` of `value`."""
    return utf8(json.dumps(finite_values(value), indent=1, ensure_ascii=ensure_ascii, allow_nan=False))


def parse_json(text: bytes | str, source: object, hint: str = "is damaged: its JSON cannot be read") -> Any:
    """The value of a JSON text; halves of surrogate pairs become U+FFFD.

    Raises:
        UserError, naming `source`: no JSON or not in UTF-8, a name twice in one object, more than `MAX_DEPTH` levels,
            or a number of too many digits.
    """
    content = text.encode(errors="surrogatepass") if isinstance(text, str) else text
    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=_unique, parse_int=_whole_number)
        return _limited(value, MAX_DEPTH, bool(MAY_HOLD_SURROGATES.search(content)))
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deep" if isinstance(error, RecursionError) else " ".join(str(error).split())[:200]
        raise UserError(f"{source} {hint} ({reason})") from None


def parse_object(text: bytes | str, source: object) -> dict[str, Any]:
    """As `parse_json`, of a text that must hold an object."""
    value = parse_json(text, source)
    if not isinstance(value, dict):
        raise UserError(f"{source} is damaged: its JSON holds a {type(value).__name__}, an object was expected")
    return value


def read_json(path: str | Path) -> dict[str, Any]:
    """The JSON object in a plain file of at most 16 MiB; UserError as `plain_files.opened` and `parse_json`."""
    return parse_object(read_bytes(path, MAX_JSON_BYTES), Path(path))


def checked(value: Any, kind: type[Kind], source: object) -> Kind:
    """`value` as `kind`, a schema of msgspec; UserError, naming `source` and the place, if it does not fit."""
    try:
        return msgspec.convert(value, kind)
    except (msgspec.ValidationError, OverflowError, RecursionError) as error:
        reason = (
            " ".join(str(error).split())[:200].replace("`", "").replace("$.", "").replace("Object missing", "missing")
        )
        raise UserError(f"{source} is damaged: {reason[:1].lower()}{reason[1:]}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a name occurs twice")
    return dict(pairs)


def _whole_number(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number has {len(digits)} digits")
    return int(digits)


def _limited(value: Any, depth: int, replace: bool) -> Any:
    """`value`, if it has at most `depth` levels; with `replace`, a copy without halves of surrogate pairs."""
    if isinstance(value, str):
        return SURROGATE.sub("\ufffd", value) if replace else value
    if not isinstance(value, dict | list):
        return value
    if depth == 0:
        raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, list):
        parts = [_limited(item, depth - 1, replace) for item in value]
        return parts if replace else value
    items = {_limited(key, 1, replace): _limited(item, depth - 1, replace) for key, item in value.items()}
    return items if replace else value
