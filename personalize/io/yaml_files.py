"""YAML files of options: names with one value or a list of values, each text, a number, yes or no, or nothing.

Nothing else of YAML is read.  Of an option that is text, `0123` and `off` are the text that stands there, and a date is
text everywhere.  Anchors and aliases, by which a few bytes can stand for millions of values, are refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError

from personalize.errors import UserError
from personalize.io.plain_files import read_text

MAX_BYTES = 256 * 2**10
TYPES = ("null", "bool", "int", "float", "str", "seq", "map")
MAX_DIGITS = 400  # of a number; the largest float has 309 before its point


class _Loader(yaml.SafeLoader):
    """Reads the types of `TYPES` alone, without aliases, and no name twice.

    is_text: whether the option of a name is text, in which no number and no yes or no is looked for.
    called: the name of the option that a name in the file means.
    """

    is_text: Callable[[str], bool]
    called: Callable[[str], str]

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in pairs if tag.rpartition(":")[2] in TYPES]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    yaml_constructors = {
        tag: build
        for tag, build in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.rpartition(":")[2] in TYPES
    }

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise ConstructorError(None, None, "an alias is not read: write its value out", mark)
        return super().compose_node(parent, index)

    def construct_scalar(self, node: Any) -> Any:
        number = node.tag.endswith((":int", ":float"))
        if number and len(str(node.value)) > MAX_DIGITS:
            raise ConstructorError(None, None, "a number has too many digits", node.start_mark)
        return super().construct_scalar(node)

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        if kind is yaml.ScalarNode and implicit[0] and ":" in value:  # 12:30 is text here, not 750, its sum in base 60
            return self.DEFAULT_SCALAR_TAG
        return super().resolve(kind, value, implicit)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        names = [str(key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        counts = Counter(map(self.called, names))
        if twice := next((name for name, count in counts.items() if count > 1), None):
            said = dict.fromkeys(name for name in names if self.called(name) == twice)
            others = f", as {' and '.join(said)}" if len(said) > 1 else ""
            raise ConstructorError(None, None, f"{twice[:80]!r} stands there twice{others}", node.start_mark)
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and self.is_text(self.called(str(key.value))):
                for one in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                    if isinstance(one, yaml.ScalarNode) and not one.tag.endswith(":null"):
                        one.tag = self.DEFAULT_SCALAR_TAG
        return super().construct_mapping(node, deep)

    def construct_decimal(self, node: Any) -> int:
        """A whole number; 010 is ten, as on the command line, not eight as in YAML 1.1."""
        text = str(self.construct_scalar(node)).replace("_", "")
        return int(text) if text.lstrip("+-").isdigit() else self.construct_yaml_int(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_decimal)


def read_options(
    path: str | Path, is_text: Callable[[str], bool] = lambda name: False, called: Callable[[str], str] = str
) -> dict[str, Any]:
    """The names and values in a YAML file; a value is a scalar or a list of scalars.

    Values of the names that `is_text` stay the text that stands there, if they are not empty.  Names are those that
    `called` gives to what stands in the file; two for one option are refused.

    Raises:
        UserError: as `read_text`; no YAML, or anything but such names and values.
    """
    text = read_text(path, MAX_BYTES)
    try:
        loader = _Loader(text)
        loader.is_text, loader.called = is_text, called
        content = loader.get_single_data()
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError, TypeError, AttributeError, KeyError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{path} is no valid YAML of options: {reason}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, expected lines of `option: value`")
    for key, value in content.items():
        if isinstance(value, dict):
            raise UserError(f"{path}: {key} must be one value or a list, got a mapping")
        if isinstance(value, list) and any(isinstance(item, list | dict) for item in value):
            raise UserError(f"{path}: {key} must be one value or a list of values, got lists within it")
    return {called(str(key)): value for key, value in content.items()}
