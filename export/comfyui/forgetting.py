"""Forgetting rules: the factor of each LoRA module of the UNet, by the table in `forgetting_rules.json`.

"decoder=0.5" halves what was learned in the decoder, "encoderattn" removes the encoder's LoRA but in its attentions,
"none" keeps everything; several rules are joined by "+", and of several that select a module the smallest counts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

TABLE = json.loads(Path(__file__).with_name("forgetting_rules.json").read_text(encoding="utf-8"))


def factors(paths: Iterable[str], text: str, blocks: int) -> dict[str, float]:
    """The factor in [0, 1] of each module path of a UNet with `blocks` down blocks.

    Raises:
        ValueError: an unknown rule, a share outside [0, 1], or a rule that selects none of `paths`.
    """
    kept = dict.fromkeys(paths, 1.0)
    for name, degree in _parsed(text):
        rule = TABLE["rules"][name]
        chosen = [path for path in kept if _selects(rule, path, blocks)]
        if rule["sides"] and not chosen:
            raise ValueError(f"the forgetting rule {name!r} selects no layer of this adapter: leave it out")
        kept |= {path: min(kept[path], degree) for path in chosen}
    return kept


def _parsed(text: str) -> list[tuple[str, float]]:
    """Names and degrees of the rules in `text`; the name of a published rule may itself hold a "+"."""
    parts: list[str] = []
    for part in map(str.strip, (text.strip() or "none").split("+")):
        if parts and f"{parts[-1]}+{part.partition('=')[0]}".strip().lower() in TABLE["rules"]:
            parts[-1] += f"+{part}"
        else:
            parts.append(part)
    return [_rule(part) for part in parts]


def _rule(text: str) -> tuple[str, float]:
    name, equals, number = (part.strip().lower() for part in text.partition("="))
    name = TABLE["aliases"].get(name, name)
    if name not in TABLE["rules"]:
        raise ValueError(f"unknown forgetting rule {text!r}: choose one of {', '.join(TABLE['rules'])}")
    try:
        degree = float(number) if equals else 0.0
    except ValueError:
        degree = -1.0
    if not 0 <= degree <= 1:
        raise ValueError(f"forgetting rule {text!r}: the share kept must be between 0 and 1")
    return name, degree


def _selects(rule: dict[str, Any], path: str, blocks: int) -> bool:
    """Whether `rule` selects the module at `path`, diffusers' path in the UNet."""
    side, level = _role(path, blocks)
    if side not in rule["sides"] or rule["level"] not in (None, level) or rule["keep_level"] == level:
        return False
    return (not rule["only"] or _has(path, rule["only"])) and not _has(path, rule["keep"])


def _role(path: str, blocks: int) -> tuple[str, int]:
    """The side of the UNet that a module is on, and how often the latents were halved before it."""
    if path.startswith("mid_block."):
        return "middle", blocks - 1
    if match := re.match(r"(down|up)_blocks\.(\d+)\.", path):
        number = int(match[2])
        return ("encoder", number) if match[1] == "down" else ("decoder", blocks - 1 - number)
    return "outside", 0


def _has(path: str, parts: Iterable[str]) -> bool:
    """Whether `path` contains one of `parts` as whole dotted names."""
    return any(f".{part}." in f".{path}." for part in parts)
