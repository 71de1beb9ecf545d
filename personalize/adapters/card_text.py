"""Text of a model card: what users wrote stays text, and the licences of known bases."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

LICENCES = (  # of base models, by a part of their hub ids
    (("embedded",), "apache-2.0"),
    (("stable-diffusion-v1", "stable-diffusion-inpainting"), "creativeml-openrail-m"),
    (("stable-diffusion-2", "stable-diffusion-xl-base-1.0", "stable-diffusion-xl-refiner-1.0"), "openrail++"),
)


def plain_text(text: str) -> str:
    """`text` on one line, with the characters escaped that mean something in Markdown or HTML."""
    return re.sub(r"([\\`*_\[\]<>|~#&])", r"\\\1", " ".join(text.split()))


def fenced(lines: Sequence[str]) -> str:
    """A block of code that holds `lines`; its fence is longer than any in them."""
    fence = "`" * max(3, 1 + max(len(run) for run in ["", *re.findall("`+", "\n".join(lines))]))
    return "\n".join([f"{fence}text", *lines, fence])


def merged_limit(sources: Sequence[Mapping[str, Any]]) -> str:
    """What a sum of adapters, as `info["merged_from"]` lists them, has lost of them."""
    lost = [plain_text(str(source["name"])) for source in sources if source.get("left_out")]
    if not lost:
        return "No source embedding belongs to it: it works alike in every program."
    return (
        f"Merged without the source embedding of {', '.join(lost)}: part of what was learned lives there, so that the "
        "picture comes back less exactly."
    )


def licence_of(base: str) -> str:
    """The licence of the base model of this name, as the hub spells it; "other" if it is not known."""
    name = base.lower()
    return next((licence for parts, licence in LICENCES if any(part in name for part in parts)), "other")
