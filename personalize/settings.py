"""The strengths of an edit and the way its pictures are drawn, as values; and the settings an adapter remembers.

`adapter.json` holds the best setting found for a prompt under "edits": prompt → strengths, seed and scores.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from personalize.attachment import parse_rules
from personalize.errors import UserError
from personalize.files import read_json, write_file
from personalize.forgetting import RULES
from personalize.verify import MANIFEST


@dataclass(frozen=True)
class Sampling:
    """How pictures are drawn: `steps` of `scheduler`, guidance (1 off, None what suits the base), size (H, W) in px."""

    steps: int = 50
    scheduler: str = "ddim"
    guidance_scale: float | None = None
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class EditStrengths:
    """The strengths of one edit; `gamma` given means subtraction, otherwise projection with `alpha` and `beta`."""

    alpha: float = 0.8
    beta: float = 1.2
    gamma: float | None = None
    forget: str = "none"
    strength: float = 1.0

    def __str__(self) -> str:
        mix = f"α {self.alpha:g}  β {self.beta:g}" if self.gamma is None else f"γ {self.gamma:g}"
        forgotten = "" if self.forget == "none" else f"  forget {self.forget}"
        return mix + forgotten + ("" if self.strength == 1 else f"  strength {self.strength:g}")


DEFAULT_SAMPLING, DEFAULT_STRENGTHS = Sampling(), EditStrengths()  # how pictures are drawn, and how strongly, if nothing else is said


def parse_rule_sum(text: str) -> list[Any]:
    """Forgetting rules of "a" or "a+b", where a published name may itself hold a plus."""
    return parse_rules([text] if text.partition("=")[0] in RULES else text.split("+")) if text != "none" else []


def remember(folder: str | Path, prompt: str, setting: EditStrengths, seed: int, scores: Mapping[str, Any]) -> None:
    """Write the best setting for `prompt` into the adapter in `folder`, in the place of an older one.

    Raises:
        UserError: no adapter folder, or it cannot be written.
    """
    path = Path(folder) / MANIFEST
    values = read_json(path)
    edits = values.get("edits")
    entry = {**asdict(setting), "seed": seed, **scores}
    values["edits"] = {**(edits if isinstance(edits, dict) else {}), _key(prompt): entry}
    write_file(path, (json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def remembered(info: Mapping[str, Any], prompt: str) -> tuple[EditStrengths, int] | None:
    """The setting and seed that an adapter's `info` holds for `prompt`; UserError if the entry is damaged."""
    edits = info.get("edits")
    entry = edits.get(_key(prompt)) if isinstance(edits, dict) else None
    if entry is None:
        return None
    try:
        setting = EditStrengths(**{field.name: entry[field.name] for field in fields(EditStrengths)})
        numbers = [setting.alpha, setting.beta, setting.strength, entry["seed"], setting.gamma or 0.0]
        if not all(isinstance(number, int | float) for number in numbers):
            raise TypeError
        parse_rule_sum(setting.forget)
        return setting, int(entry["seed"])
    except (KeyError, TypeError, AttributeError):
        raise UserError(
            f"{MANIFEST} is damaged: the remembered setting of {prompt!r} is {entry!r}; give --alpha and --beta"
        ) from None


def _key(prompt: str) -> str:
    return " ".join(prompt.split())
