"""Where the base models of this machine lie, by their hash.

Adapters and pictures name a base that lies in a folder by the folder's name and a hash, never by its path. So that
`edit ADAPTER` finds it again all the same, the path is kept in ~/.cache/personalize/bases.json (below XDG_CACHE_HOME,
if that is set), which nobody else sees.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from personalize.errors import UserError
from personalize.io.atomic import write_file
from personalize.io.json_files import read_json
from personalize.io.plain_files import at_home
from personalize.models.config import HUB_ID


def portable_name(name: str) -> str:
    """A base's name without the folders it lies in; a hub id stays as it is."""
    path = at_home(name)
    return path.resolve().name if name and path.exists() else name


def remember_base(sha256: str, name: str) -> None:
    """Keep where the base of this hash lies, if `name` is a path; failures to write are ignored.

    Of two processes that write at the same moment one may lose its entry, which its next run writes again.
    """
    place = at_home(name)
    if not name or not place.exists():
        return
    path = str(place.resolve())
    known = _known()
    if known.get(sha256) != path:
        try:
            _file().parent.mkdir(parents=True, exist_ok=True)
            write_file(_file(), json.dumps({**known, sha256: path}, indent=1).encode())
        except (OSError, UserError):
            return


def find_base(base: Mapping[str, Any], *, allow_download: bool = False) -> str | None:
    """The `source` to give `StableDiffusion.load` for the base that an adapter records.

    None for the package's own, a path, or a hub id. An adapter may come from anyone, so the hub is not asked for the
    base that it names: it must have been downloaded before, unless `allow_download`; pass `local_files_only` otherwise.

    Raises:
        UserError: it lay in a folder that is not known on this machine, or would have to be downloaded.
    """
    name = str(base.get("name") or "")
    if name in ("", "embedded"):  # a folder may be called like the package's own model
        return _by_hash(base)
    if path := base_here(base):
        return path
    if not re.fullmatch(HUB_ID, name):
        known_by = f" ({str(base['sha256'])[:10]})" if base.get("sha256") else ""
        raise UserError(
            f"the adapter was trained on the base {name}{known_by}, which was not used on this "
            "machine yet: name it with --pretrained_model_name_or_path"
        )
    if allow_download or _downloaded(name):
        return name
    raise UserError(
        f"the adapter names the base {name} of the hub, which was not downloaded yet: allow it with --allow_download, "
        "or name a base with --pretrained_model_name_or_path"
    )


def _downloaded(name: str) -> bool:
    """Is the model of this hub id in the hub's cache on this machine?"""
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(name, "model_index.json"), str)


def base_here(base: Mapping[str, Any]) -> str | None:
    """The path of the base that an adapter records, if it is known on this machine; a hub id counts as not known."""
    name = str(base.get("name") or "")
    return _by_hash(base) or (name if name and not _on_a_network(name) and Path(name).exists() else None)


def _by_hash(base: Mapping[str, Any]) -> str | None:
    """Where the base of this hash lay when it was last used, if it is still there."""
    place = _known().get(str(base.get("sha256")))
    return place if place and not _on_a_network(place) and Path(place).exists() else None


def _on_a_network(place: str) -> bool:
    """Would asking whether this path exists connect to another machine, as Windows does for `\\\\host\\share`?"""
    return place[:2].replace("\\", "/") == "//"


def _file() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "personalize" / "bases.json"


def _known() -> dict[str, str]:
    try:
        found = read_json(_file())
    except UserError:
        return {}
    return {key: value for key, value in found.items() if isinstance(value, str)}
