"""The best strengths found for a prompt, as an adapter folder stores them for later edits.

They are in `adapter.json` under "edits": prompt → strengths, seed, scores, and the caption of the pictures that the
edit starts from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from personalize.adapters.adapter_files import WAIT
from personalize.adapters.forgetting import parse_rule_sum
from personalize.editing.config import EditStrengths
from personalize.errors import UserError
from personalize.formats.adapter_folders import MANIFEST
from personalize.formats.integrity import sealed
from personalize.io.atomic import write_file
from personalize.io.json_files import read_json
from personalize.io.locks import folder_lock


def remember(folder: str | Path, prompt: str, strengths: EditStrengths, seed: int, scores: Mapping[str, Any]) -> None:
    """Store the best strengths for `prompt` in the adapter folder, in place of those stored before.

    Raises:
        UserError: `folder` is no adapter folder, or it cannot be written.
    """
    path = Path(folder) / MANIFEST
    with folder_lock(folder, "writing", wait=WAIT):  # what others store meanwhile is not lost
        values = read_json(path)
        edits = values.get("edits")
        entry = {**asdict(strengths), "seed": seed, **scores}
        values["edits"] = {**(edits if isinstance(edits, dict) else {}), _key(prompt): entry}
        write_file(path, sealed(values))


def remembered(info: Mapping[str, Any], prompt: str, caption: str | None = None) -> tuple[EditStrengths, int] | None:
    """The strengths and seed that an adapter's `info` stores for `prompt`, or None; UserError if damaged.

    With a `caption` those of edits that start from another one do not count; earlier versions stored none.
    """
    edits = info.get("edits")
    entry = edits.get(_key(prompt)) if isinstance(edits, dict) else None
    stored = entry.get("caption") if isinstance(entry, dict) else None
    if entry is None or None not in (stored, caption) and stored != caption:
        return None
    try:
        strengths = EditStrengths(**{field.name: entry[field.name] for field in fields(EditStrengths)})
        numbers = [strengths.alpha, strengths.beta, strengths.strength, entry["seed"], strengths.gamma or 0.0]
        if not all(isinstance(number, int | float) for number in numbers):
            raise TypeError
        parse_rule_sum(strengths.forget)
        return strengths, int(entry["seed"])
    except (KeyError, TypeError, AttributeError, UserError):
        raise UserError(
            f"{MANIFEST} is damaged: the remembered strengths of {prompt!r} is {entry!r}; give --alpha and --beta"
        ) from None


def _key(prompt: str) -> str:
    """`prompt` with single spaces: the key under which its strengths are stored."""
    return " ".join(prompt.split())
