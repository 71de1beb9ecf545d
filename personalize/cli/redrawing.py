"""Drawing a marked picture again: the options in it, and whether the same files are at hand.

`edit --from PICTURE` reads the options in a picture as if they stood in a YAML file: options on the command line take
their place. What is named by a path is not in the picture, only its name and hash: it is given again, and compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from personalize.cli.lists import flag_name
from personalize.errors import UserError

NOT_KEPT = {  # options that do not decide a picture, or name what only this machine has; no picture may set them
    "output_dir", "metadata", "provenance", "c2pa", "keep_exif", "from_", "revision", "variant", "trajectory",
    "pretrained_model_name_or_path", "allow_download",
}  # fmt: skip
NETWORKS = {"clip_model", "identity_model"}  # may name a place on the hub
SEEDS = {"seed", "seeds", "num_images"}  # options that take each other's place
LORA = "pytorch_lora_weights.safetensors"


def file_mark(path: Path) -> dict[str, str]:
    """Name and SHA-256 of a file; of an adapter folder, that of its LoRA in diffusers' layout."""
    file = path / LORA if path.is_dir() else path
    name = path.resolve().name if path.is_dir() else path.stem
    return {"name": name, "sha256": sha256(file.read_bytes()).hexdigest()}


def recorded(path: Path) -> dict[str, Any]:
    """The details in a picture that `personalize edit` drew; UserError if there are none."""
    from personalize.io.provenance import read_marks

    details = read_marks(path).details
    if details is None or not isinstance(details.get("options"), dict):
        raise UserError(f"{path} does not say how it was drawn: expected a picture of personalize edit with metadata")
    if details.get("command") not in ("edit", "edit PHOTO"):
        raise UserError(f"{path} was made by personalize {details.get('command')}: only edits are drawn again from it")
    return details


def redrawn(words: Sequence[str], picture: Path) -> tuple[str, list[str], dict[str, Any]]:
    """The command that drew `picture`, its words, and the options that the picture gives.

    An adapter that is not named is looked for by its hash, near the picture and in the current folder.
    """
    details, words = recorded(picture), list(words)
    options = {name: value for name, value in details["options"].items() if name not in NOT_KEPT | NETWORKS}
    if {flag_name(word) for word in words} & SEEDS:
        options = {name: value for name, value in options.items() if name not in SEEDS}
    named = any(not word.startswith("-") for word in words[:1])
    if not named and details["command"] == "edit":
        words.insert(0, str(_find_adapter(picture, details["adapters"][0])))
    elif not named:
        photo = details.get("files", {}).get("photo", {}).get("name", "the photo")
        raise UserError(f"{picture} is an edit of the photo {photo!r}: name its file before --from")
    return details["command"], words, options


def _find_adapter(picture: Path, mark: Mapping[str, str]) -> Path:
    places = {folder.resolve() for start in (picture.resolve().parent, Path.cwd()) for folder in (start, start.parent)}
    candidates = sorted({found.parent for place in places for found in (*place.glob(LORA), *place.glob(f"*/{LORA}"))})
    for folder in candidates:
        if file_mark(folder)["sha256"] == mark["sha256"]:
            return folder
    raise UserError(
        f"{picture} was drawn with the adapter {mark['name']}, which is neither near it nor here: name its folder first"
    )


def check_same(details: Mapping[str, Any], recorded_details: Mapping[str, Any], picture: Path) -> None:
    """UserError unless base, adapters and files are those that `picture` was drawn with."""
    pairs = [("base", details["base"], recorded_details["base"])]
    for kind in ("adapters", "files"):
        now, then = details[kind], recorded_details[kind]
        if len(now) != len(then):
            raise UserError(f"{picture} was drawn with {len(then)} {kind}, {len(now)} are given: {_names(then)}")
        keys = range(len(then)) if isinstance(then, list) else then
        pairs += [(kind.removesuffix("s"), now[key], then[key]) for key in keys]
    for what, now, then in pairs:
        if now["sha256"] != then["sha256"]:
            raise UserError(
                f"{picture} was drawn with the {what} {then['name']} ({then['sha256'][:10]}), got {now['name']} "
                f"({now['sha256'][:10]}): give the same one"
            )


def _names(marks: Any) -> str:
    return ", ".join(one["name"] for one in (marks if isinstance(marks, list) else marks.values())) or "none"
