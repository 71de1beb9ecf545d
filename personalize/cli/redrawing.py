"""`edit --from PICTURE`: draw a picture again by the options that it records, with the same files.

The options in a picture are read as if they stood in a YAML file: options on the command line take their place. What
is named by a path is not in the picture, only its name and hash: it is given again, and compared.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from glob import escape
from pathlib import Path
from typing import Any

import msgspec

from personalize.cli.lists import flag_name
from personalize.cli.places import box
from personalize.errors import UserError, typed
from personalize.formats.adapter_folders import DIFFUSERS_FILE, in_several_files
from personalize.io.json_files import checked
from personalize.io.plain_files import file_hash

NEVER_FROM_A_PICTURE = {  # neither written into one nor taken from one
    "output_dir", "metadata", "provenance", "c2pa", "keep_exif", "from_", "revision", "variant", "trajectory",
    "pretrained_model_name_or_path", "allow_download", "photo", "adapter", "add", "source_image",
}  # fmt: skip
NETWORKS = {"clip_model", "identity_model"}  # hub ids: written, but never taken from a picture
PLACES = {"mask", "region", "background_mask"}  # a file, or what is none: a box, a word
EXCLUSIVE = (  # giving one of a group on the command line drops the picture's values of the whole group
    {"seed", "seeds", "num_images"}, {"alpha", "beta", "gamma", "auto"}, {"target", "swap"},
)  # fmt: skip
OF_A_SEARCH = {"forget", "strength", "seed", "seeds", "num_images"}  # what --auto chooses itself


class NameAndHash(msgspec.Struct, frozen=True):
    """A file or base that a picture was drawn with."""

    name: str
    sha256: str


class Details(msgspec.Struct, frozen=True):
    """What drawing a picture again needs of the JSON in it."""

    command: str
    options: dict[str, Any]
    base: NameAndHash
    adapters: list[NameAndHash]
    files: dict[str, NameAndHash] = {}
    seed: int | None = None


def name_and_hash(path: Path) -> dict[str, str]:
    """Name and SHA-256 of a file; of an adapter folder, its name and the hash of its LoRA in diffusers' layout."""
    file = path / DIFFUSERS_FILE if path.is_dir() else path
    return {"name": given_name(path), "sha256": file_hash(file)}


def adapter_name_and_hash(path: Path) -> dict[str, str]:
    """Name and hash of an adapter; of one in several files, as PEFT's folders and shards, the hash of all that is read.

    Raises:
        UserError: it is in several files, and one of them is missing or damaged.
    """
    if not in_several_files(path):
        return name_and_hash(path)
    from personalize.formats.adapter_source import adapter_hash  # imports torch, which other adapters do not need

    return {"name": given_name(path), "sha256": adapter_hash(path)}


def given_name(path: Path) -> str:
    """The last part of a path, as it was given: the hub's cache links a file's name to one that is a hash."""
    return os.path.basename(os.path.abspath(path))


def names_a_file(option: str, value: Any) -> bool:
    """Whether the value of an option is, or may be, a path of somebody's machine."""
    parts = value if isinstance(value, tuple | list) else (value,)
    if option in PLACES:
        places = (str(part).rpartition("=")[2] for part in parts if part is not None)
        return any(place not in ("auto", "none") and box(place) is None for place in places)
    return any(isinstance(part, Path) for part in parts)


def recorded(path: Path) -> Details:
    """The details in a picture that `personalize edit` drew; UserError if there are none, or they are damaged."""
    from personalize.io.provenance import read_marks

    details = read_marks(path).details
    if details is None:
        raise UserError(f"{path} does not say how it was drawn: expected a picture of personalize edit with metadata")
    if details.get("command") not in ("edit", "edit PHOTO"):
        raise UserError(f"{path} was made by personalize {details.get('command')}: only edits are drawn again from it")
    found = checked(details, Details, path)
    if found.command == "edit" and not found.adapters:
        raise UserError(f"{path} names no adapter: its settings are damaged")
    return found


def redrawn(words: Sequence[str], picture: Path) -> tuple[str, list[str], dict[str, Any]]:
    """The key of COMMANDS that drew `picture`, the tokens `words` after `edit` with the adapter first, its options.

    Only the first adapter is looked for, by its hash, as a folder of any name or as what has its name: in the picture's
    folder, the current one, their parents, and one level below each. Others (`--add`) must be given again.
    """
    details, words = recorded(picture), list(words)
    dropped = NEVER_FROM_A_PICTURE | NETWORKS
    given = {flag_name(word) for word in words}
    for group in EXCLUSIVE:
        dropped |= group if group & given else set()
    dropped |= OF_A_SEARCH if "auto" in given else set()
    dropped |= {"source_caption"} if "prompt" in given else set()  # another may be nearer to that prompt
    options = {
        name: value for name, value in details.options.items()
        if name not in dropped and not (name in PLACES and names_a_file(name, value))
    }  # fmt: skip
    before = zip(("", *words), words, strict=False)
    named = any(not word.startswith("-") for word in words[:1]) or any(
        not flag.startswith("--") and not word.startswith("-") and os.path.exists(word) for flag, word in before
    )
    if not named and details.command == "edit":
        words.insert(0, str(_find_adapter(picture, details.adapters[0])))
    elif not named:
        photo = details.files["photo"].name if "photo" in details.files else "the photo"
        raise UserError(f"{picture} is an edit of the photo {photo!r}: name its file before --from")
    return details.command, words, options


def redraw_command(picture: Path) -> str:
    """The command that draws `picture` again, with the names of what it does not find itself; UserError if damaged."""
    details = recorded(picture)
    names = {name: file.name for name, file in details.files.items()}
    adapters = [adapter.name for adapter in details.adapters]
    if details.command == "edit":
        more = [f"--add={name}" for name in adapters[1:]]
        return typed("personalize", "edit", "--from", picture, *more)
    more = [f"--adapter={name}" for name in adapters]
    more += [f"--pretrained_model_name_or_path={details.base.name}"] * (
        not adapters and details.base.name != "embedded"
    )
    for option, name in names.items():
        option, _, noun = option.partition(" ")  # "mask", "region cat"
        more += [] if option == "photo" else [f"--{option}={f'{noun}=' if noun else ''}{name}"]
    return typed("personalize", "edit", names.get("photo", "PHOTO"), "--from", picture, *more)


def _find_adapter(picture: Path, wanted: NameAndHash) -> Path:
    places = {folder.resolve() for start in (picture.resolve().parent, Path.cwd()) for folder in (start, start.parent)}
    folders = {found.parent for found in _found(places, DIFFUSERS_FILE)}
    named = _found(places, wanted.name) if Path(wanted.name).name == wanted.name else set()
    for adapter in (*sorted(named), *sorted(folders - named)):
        if _hash(adapter) == wanted.sha256:
            return adapter
    raise UserError(
        f"{picture} was drawn with the adapter {wanted.name}, which is neither near it nor here: name it first"
    )


def _found(places: set[Path], name: str) -> set[Path]:
    """What is called `name` in one of the `places`, or one level below; nothing for what can be no name of a file."""
    try:
        return {found for place in places for level in ("", "*/") for found in place.glob(level + escape(name))}
    except (ValueError, OSError):
        return set()


def _hash(adapter: Path) -> str | None:
    """The hash of an adapter as pictures have it; None for what is none."""
    try:
        return adapter_name_and_hash(adapter)["sha256"]
    except UserError:
        return None


def check_same(made: Mapping[str, Any], picture: Path) -> None:
    """UserError unless base, adapters and files of `made` (see `details_of`) are those `picture` was drawn with."""
    details, then_all = checked(dict(made), Details, picture), recorded(picture)
    pairs = [("base", details.base, then_all.base)]
    for kind in ("adapters", "files"):
        now, then = getattr(details, kind), getattr(then_all, kind)
        if not isinstance(then, list) and now.keys() != then.keys():
            raise UserError(f"{picture} was drawn with the files {', '.join(then)}; given are {', '.join(now)}")
        if len(now) != len(then):
            raise UserError(f"{picture} was drawn with {len(then)} {kind}, {len(now)} are given: {_names(then)}")
        keys = range(len(then)) if isinstance(then, list) else then
        pairs += [(kind.removesuffix("s"), now[key], then[key]) for key in keys]
    for what, now, then in pairs:
        if now.sha256 != then.sha256:
            raise UserError(
                f"{picture} was drawn with the {what} {then.name} ({then.sha256[:10]}), got {now.name} "
                f"({now.sha256[:10]}): give the same one"
            )


def _names(marks: Any) -> str:
    return ", ".join(one.name for one in (marks if isinstance(marks, list) else marks.values())) or "none"
