"""Reading options: a command line becomes an instance of a frozen dataclass, with defaults from YAML files.

A flag is the name of a field, written with dashes or underscores.  A flag on the command line has precedence over the
same key in a file.  All options are checked here before torch is imported, so that this module must not import torch or
anything that does.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, fields, replace
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from personalize.cli.lists import flag_name, gathered, repeated
from personalize.cli.terminal import unwrapped
from personalize.cli.wording import as_options, of_tyro, worded
from personalize.errors import Notice, UserError, nearest
from personalize.io.json_files import SURROGATE
from personalize.io.plain_files import at_home
from personalize.io.yaml_files import read_options
from personalize.models.ranges import check_ranges

ALIASES = {  # names of the same options in sd-scripts and in diffusers' DreamBooth script
    "network_dim": "rank", "network_alpha": "lora_alpha", "instance_prompt": "caption",
}  # fmt: skip
HELP = {"-h", "--help"}
QUIET = "--quiet"  # is taken by every command, and seen to before its options are read
_POSITIONAL = get_args(tyro.conf.Positional[Path])[1]  # tyro's mark of an argument without a flag

ConfigT = TypeVar("ConfigT")


def parse(
    config: type[ConfigT],
    args: Sequence[str],
    *,
    prog: str,
    description: str = "",
    presets: Mapping[str, Path] | None = None,
    recorded: Mapping[str, Any] | None = None,
) -> ConfigT:
    """Read the command line `args` into an instance of the dataclass `config`; `--help` prints the options and exits.

    recorded: options that a picture was drawn with; those of files and of the command line take their place.

    `--config X` may stand anywhere and several times, the later file having precedence; X is a YAML file or one of
    `presets`.

    Raises:
        UserError: an unknown option or key (the message names the nearest), a missing option, or a wrong value.
    """
    files, args = take_option(args, "config")
    args = [_resolved(token, config) for token in args if token != QUIET]
    if HELP & set(args):
        about = _about(description, presets)
        with contextlib.redirect_stdout(unwrapped(sys.stdout)):  # its colours, in a text that is ours
            tyro.cli(config, args=["--help"], prog=prog, description=about, use_underscores=True, registry=_registry())
    flags = [name for token in args if (name := flag_name(token))]
    _check_names(flags, config, "option", "--")
    replaces, defaults = getattr(config, "replaces", {}), dict[str, Any](recorded or {})
    _check_names(list(defaults), config, "option in the picture", "")
    for file in files:
        content = read_yaml(_find(file, presets or {}), config)
        replaced = {other for key, other in replaces.items() if content.get(key) is not None}
        defaults = {key: value for key, value in defaults.items() if key not in replaced} | content
    given = {*flags, *(name.removeprefix("no_") for name in flags)}
    defaults = {key: value for key, value in defaults.items() if value is not None}  # nothing: it is left out
    _check_required(config, given | set(defaults), prog)
    settled = given | {key for flag, key in replaces.items() if flag in given}
    tokens = [t for key, value in defaults.items() if key not in settled for t in _tokens(key, value, config)]
    hints = option_types(config)
    lists = {name for name, hint in hints.items() if get_origin(hint) is tuple and not _is_positional(config, name)}
    switches = {name for name, hint in hints.items() if hint is bool}
    for sentence in repeated(args, lists=lists, switches=switches):
        warnings.warn(sentence, Notice, stacklevel=2)
    args = gathered(args, tokens, lists=lists, switches=switches, needs_argument=_needs_argument(config))
    with worded(hints), _one_line(prog, hints):
        options = tyro.cli(config, args=args, prog=prog, use_underscores=True, registry=_registry())
    check_ranges(options, "--")
    _check_texts(options)
    return replace(options, **_expanded_homes(options))  # pyright: ignore[reportArgumentType]


def _needs_argument(config: type) -> bool:
    """Has the command an argument without a flag that must be given?"""
    required = [f.name.rstrip("_") for f in fields(config) if f.default is MISSING and f.default_factory is MISSING]
    return any(_is_positional(config, name) for name in required)


def _check_texts(options: Any) -> None:
    """UserError for words with bytes that are no UTF-8 (halves of surrogate pairs); paths that exist may have them."""
    for field in fields(options):
        value = getattr(options, field.name)
        for text in value if isinstance(value, tuple) else (value,):
            if isinstance(text, str) and SURROGATE.search(text) and not os.path.lexists(text):
                name = field.name.rstrip("_")
                raise UserError(
                    f"--{name} is {text!r}, which is no UTF-8: set the terminal to UTF-8, and write it anew"
                )


def _expanded_homes(options: Any) -> dict[str, Any]:
    """The fields of `options` with a leading `~` as the home folder, which a shell leaves in `--output_dir=~/x`."""
    changes = {f.name: _expanded_home(getattr(options, f.name)) for f in fields(options) if f.init}
    return {name: value for name, value in changes.items() if value != getattr(options, name)}


def _expanded_home(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_expanded_home, value))
    if isinstance(value, Path) or (isinstance(value, str) and value.startswith(("~/", "~\\"))):
        return type(value)(os.path.expanduser(value))  # unchanged where no such user is known: it may be a file's name
    return value


@cache
def _registry() -> ConstructorRegistry:
    """Rules of tyro's: an option that may be left out shows in the help as what it takes, not as `{None}|PATH`."""
    registry = ConstructorRegistry()

    @registry.primitive_rule
    def optional(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
        kinds = [kind for kind in get_args(info.type) if kind is not type(None)]
        if info.type_origin not in (Union, UnionType) or len(kinds) != 1 or len(get_args(info.type)) != 2:
            return None
        spec = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(kinds[0], info.markers))
        if not isinstance(spec, PrimitiveConstructorSpec):
            return None
        return replace(
            spec,
            instance_from_str=lambda words: None if words == ["None"] else spec.instance_from_str(words),
            is_instance=lambda value: value is None or spec.is_instance(value),
            str_from_instance=lambda value: ["none"] if value is None else spec.str_from_instance(value),
        )

    return registry


def take_option(args: Sequence[str], name: str) -> tuple[list[str], list[str]]:
    """Split `args` into the values of every `--name value` or `--name=value`, and the remaining arguments."""
    values, rest, tokens = [], [], iter(args)
    for token in tokens:
        if flag_name(token) != name:
            rest.append(token)
            continue
        value = token.partition("=")[2] if "=" in token else next(tokens, "")
        if not value or flag_name(value):
            raise UserError(f"--{name} needs a value, got {value or 'nothing'}")
        values.append(value)
    return values, rest


def read_yaml(path: Path, config: type) -> dict[str, Any]:
    """The keys and values of the YAML file `path`; UserError for an unknown key or a switch that is no truth value."""
    types = option_types(config)
    texts = {name for name, hint in types.items() if _is_text(hint)}
    content = read_options(path, texts.__contains__, lambda name: _field_name(name, config))
    if "config" in content and "config" not in types:
        raise UserError(f"{path}: a file cannot name other files: write --config several times on the command line")
    _check_names(content, config, f"key in {path}:")
    for key, value in content.items():
        if _is_positional(config, key):
            raise UserError(f"{path}: {key} is given on the command line itself, not in a file")
        if isinstance(value, list) and None in value:
            raise UserError(f"{path}: {key} has an empty value in its list: write one, or leave it out")
        if types[key] is bool and not isinstance(value, bool | None):
            raise UserError(f"{path}: {key} is {value!r}, expected true or false")
    return content


def _is_text(hint: Any) -> bool:
    """Is an option of this type text, a path, or one of several words, or a list of such?"""
    if get_origin(hint) is Literal:
        return all(isinstance(word, str) for word in get_args(hint))
    kinds = [kind for kind in get_args(hint) if kind not in (type(None), Ellipsis)]
    return hint in (str, Path) or (bool(kinds) and all(map(_is_text, kinds)))


def _field_name(name: str, config: type) -> str:
    """The field of `config` that `name` means: dashes become underscores, names of `ALIASES` ours."""
    name = name.replace("-", "_")
    return ALIASES[name] if ALIASES.get(name) in option_types(config) else name


def _resolved(token: str, config: type) -> str:
    """`token` with the name of its flag, if it has one, as the field of `config`."""
    name = flag_name(token)
    return token if name is None else f"--{_field_name(name, config)}{token[2 + len(name) :]}"


def _check_names(names: Iterable[str], config: type, what: str, prefix: str = "") -> None:
    """UserError unless each of `names` is a field of `config`, or `no_` followed by a boolean field.

    The class attribute `refused` of `config` holds options of other programs, and why there is none of that name here.
    """
    hints = option_types(config)
    known = {name for name in hints if prefix == "" or not _is_positional(config, name)}
    switches = {f"no_{name}" for name in known if hints[name] is bool} if prefix else set()
    refused = getattr(config, "refused", {})
    for name in names:
        if reason := refused.get(name) or refused.get(name.removeprefix("no_")):
            where = "" if prefix else f"{what.partition(' in ')[2]} "
            raise UserError(f"{where}{prefix}{name} is refused: {reason}")
        if name not in known | switches:
            also = {"config"} if prefix else set()
            raise UserError(f"unknown {what} {prefix}{name}: {nearest(name, known | also, prefix)}")


def _check_required(config: type, given: set[str], prog: str) -> None:
    required = [f.name.rstrip("_") for f in fields(config) if f.default is MISSING and f.default_factory is MISSING]
    missing = [f"--{name}" for name in required if name not in given and not _is_positional(config, name)]
    if missing:
        raise UserError(f"{prog} needs {' and '.join(missing)} (see {prog} --help)")


def option_types(config: type, include_extras: bool = False) -> dict[str, Any]:
    """The type of each option; a field whose name would be a Python keyword ends in an underscore: `from_`."""
    return {name.rstrip("_"): hint for name, hint in get_type_hints(config, include_extras=include_extras).items()}


def _is_positional(config: type, name: str) -> bool:
    return _POSITIONAL in getattr(option_types(config, include_extras=True)[name], "__metadata__", ())


def _tokens(key: str, value: Any, config: type) -> list[str]:
    """One YAML entry as the tokens of the same option on a command line, so that tyro checks both in the same way."""
    hint = option_types(config)[key]
    if isinstance(value, bool) and hint is bool:
        return [f"--{key}" if value else f"--no_{key}"]
    if isinstance(value, bool):
        value = str(value).lower()
    if isinstance(value, list):
        if value and get_origin(hint) is not tuple:
            raise UserError(f"--{key} takes one value, got {', '.join(map(str, value))}: leave one of them")
        return [f"--{key}={one}" for one in value]
    return [f"--{key}={value}"]


def _find(name: str, presets: Mapping[str, Path]) -> Path:
    path = at_home(name)
    if path.is_file():
        return path
    if name in presets:
        return presets[name]
    if path.exists():  # a pipe, a device or a folder: reading it says so
        return path
    hint = f"; presets: {', '.join(sorted(presets))}" if presets else ""
    raise UserError(f"--config {name}: no such file{hint}")


def _about(description: str, presets: Mapping[str, Path] | None) -> str:
    names = f", or a preset: {', '.join(sorted(presets))}" if presets else ""
    config = f"--config FILE reads defaults for these options from YAML (same names){names}; flags win."
    lists = "An option of several values takes them after one flag or after several: --x 1 2, or --x 1 --x 2."
    return f"{description.strip()}\n\n{config}\n\n{lists}\n\n{QUIET} shows no progress."


@contextlib.contextmanager
def _one_line(prog: str, hints: Mapping[str, Any]):
    """Turn tyro's error message, several lines in a box, into a UserError of one line."""
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message):
            yield
    except UserError as error:  # tyro before 1.0.16 lets an option's own check through
        raise UserError(f"{as_options(str(error).rstrip('.'), hints)} (see {prog} --help)") from None
    except SystemExit as error:
        if error.code == 0:
            raise
        ours = _own_error(error)  # tyro's box breaks its lines anywhere, also within a number or a path
        text = _sentence(message.getvalue(), hints) if ours is None else as_options(str(ours).rstrip("."), hints)
        raise UserError(f"{text} (see {prog} --help)") from None


def _own_error(error: BaseException) -> UserError | None:
    """The UserError that an option's own check has raised below `error`, if one has."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, UserError):
        cause = cause.__context__
    return cause


def _sentence(box: str, hints: Mapping[str, Any]) -> str:
    """The text of tyro's boxed error message, without colours, frame, title, and the hints below its first line."""
    lines = [line.strip("│ ") for line in re.sub(r"\x1b\[[\d;]*m", "", box).splitlines()]
    parts = re.split(r"\n[─-]+(?=\n)", "\n".join(lines[1:]).lstrip("─-"))  # a plain box has a rule under its title
    text = " ".join(re.sub("[╰─╯]+", "", parts[0]).replace("(required)", "").split())
    return of_tyro(text.rstrip("."), hints) or "the options were not understood"
