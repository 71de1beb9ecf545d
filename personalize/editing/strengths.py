"""The strengths of an edit and the options of sampling, as values; and how an adapter stores its best strengths.

The best strengths of a prompt are stored in `adapter.json` under "edits": prompt → strengths, seed and scores.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from personalize.adapters.forgetting import parse_rule_sum
from personalize.errors import UserError
from personalize.formats.manifest import MANIFEST
from personalize.io.atomic import write_file
from personalize.io.tensor_files import read_json


@dataclass(frozen=True)
class Sampling:
    """How images are sampled.

    scheduler: a name in `personalize.sampling.denoise.SCHEDULERS`.
    guidance_scale: as in diffusers, 1 is off; None is the base model's, by `personalize.editing.defaults`.
    size: height and width in pixels; None is the size at which the adapter was trained.
    """

    steps: int = 50
    scheduler: str = "ddim"
    guidance_scale: float | None = None
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class EditStrengths:
    """The strengths of one edit.

    alpha, beta: weights of the source and of the edit in vector projection.
    gamma: the share of the prompt in vector subtraction, which takes the place of projection if it is given.
    forget: forgetting rules joined by "+", or "none".
    strength: factor on the whole adapter.
    """

    alpha: float = 0.8
    beta: float = 1.2
    gamma: float | None = None
    forget: str = "none"
    strength: float = 1.0

    def __str__(self) -> str:
        mix = f"alpha {self.alpha:g}  beta {self.beta:g}" if self.gamma is None else f"gamma {self.gamma:g}"
        forgotten = "" if self.forget == "none" else f"  forget {self.forget}"
        return mix + forgotten + ("" if self.strength == 1 else f"  strength {self.strength:g}")


DEFAULT_SAMPLING, DEFAULT_STRENGTHS = Sampling(), EditStrengths()


def remember(folder: str | Path, prompt: str, strengths: EditStrengths, seed: int, scores: Mapping[str, Any]) -> None:
    """Store the best strengths for `prompt` in the adapter folder, in place of those stored before.

    Raises:
        UserError: `folder` is no adapter folder, or it cannot be written.
    """
    path = Path(folder) / MANIFEST
    values = read_json(path)
    edits = values.get("edits")
    entry = {**asdict(strengths), "seed": seed, **scores}
    values["edits"] = {**(edits if isinstance(edits, dict) else {}), _key(prompt): entry}
    write_file(path, (json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def remembered(info: Mapping[str, Any], prompt: str) -> tuple[EditStrengths, int] | None:
    """The strengths and seed that an adapter's `info` stores for `prompt`, or None; UserError if damaged."""
    edits = info.get("edits")
    entry = edits.get(_key(prompt)) if isinstance(edits, dict) else None
    if entry is None:
        return None
    try:
        strengths = EditStrengths(**{field.name: entry[field.name] for field in fields(EditStrengths)})
        numbers = [strengths.alpha, strengths.beta, strengths.strength, entry["seed"], strengths.gamma or 0.0]
        if not all(isinstance(number, int | float) for number in numbers):
            raise TypeError
        parse_rule_sum(strengths.forget)
        return strengths, int(entry["seed"])
    except (KeyError, TypeError, AttributeError):
        raise UserError(
            f"{MANIFEST} is damaged: the remembered strengths of {prompt!r} is {entry!r}; give --alpha and --beta"
        ) from None


def _key(prompt: str) -> str:
    """`prompt` with single spaces: the key under which its strengths are stored."""
    return " ".join(prompt.split())
