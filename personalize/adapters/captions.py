"""Which of an adapter's captions a prompt starts from, where each has a source embedding of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any

from torch import Tensor

from personalize.errors import UserError, nearest


def captions_of(info: Mapping[str, Any], source: Mapping[str, Any] | None) -> tuple[str, ...]:
    """The captions in an adapter's metadata, one for each row of its source embedding.

    Adapters of versions that kept one row have the first caption alone, whatever number of captions was learned.
    """
    captions = tuple(map(str, info.get("captions") or [info.get("caption", "")]))
    one_row = source is not None and len(source.get("embeds", captions)) == 1
    return captions[:1] if one_row else captions


def nearest_caption(prompt: str, captions: Sequence[str]) -> int:
    """The number of the caption that has most words in common with `prompt`, in the same order; the first of equals.

    The measure is 2 m / (n + k) for m common words of n in the prompt and k in the caption, as a source embedding is
    edited word by word (see `prompts.align_prompt`).
    """
    words = prompt.casefold().split()
    ratios = [SequenceMatcher(None, words, caption.casefold().split(), False).ratio() for caption in captions]
    return ratios.index(max(ratios))


def find_caption_number(caption: str, captions: Sequence[str]) -> int:
    """The number of `caption` among `captions`, however it is spaced and capitalised; UserError if it is none."""
    wanted = " ".join(caption.casefold().split())
    plain = [" ".join(one.casefold().split()) for one in captions]
    if wanted not in plain:
        hint = nearest(wanted, plain) if len(captions) > 1 else f"it has “{captions[0]}” alone"
        raise UserError(f"the adapter learned no picture with the caption {caption!r}: {hint}")
    return plain.index(wanted)


def source_row(source: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    """The source embedding of caption `number`: "embeds" (1, l, d) and, for SDXL, "pooled" (1, e)."""
    return {name: rows[number : number + 1] for name, rows in source.items()}


def caption_info(info: Mapping[str, Any], captions: Sequence[str], number: int) -> dict[str, Any]:
    """The metadata `info` of an adapter with caption `number` of its `captions` alone, and the size of its pictures."""
    others = {key: value for key, value in info.items() if not key.startswith("caption")}
    sizes = info.get("caption_sizes")
    own = {"size": sizes[number]} if isinstance(sizes, list) and len(sizes) == len(captions) else {}
    return others | {"caption": captions[number]} | own
