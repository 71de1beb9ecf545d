"""What users of an adapter should know of its training, in sentences, from the options in its metadata."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def training_notes(info: Mapping[str, Any]) -> list[str]:
    """A sentence for each option of the training that changes what the files hold or how prompts act."""
    config, kept = info.get("config"), info.get("kept_best")
    if not isinstance(config, Mapping):
        return []
    share, token = config.get("proportion_empty_prompts"), str(config.get("instance_token") or "").partition(" ")[0]
    notes = {
        f"The weights are those with the best score of the training's validation pictures, {_kept(kept)}": kept,
        "The weights are the moving average of the training, not those after its last update": config.get("use_ema"),
        f"{_percent(share)} of the samples were learned without their caption, which guidance subtracts": share,
        "Its strength is alpha / √rank (rank-stabilised); the alpha in the files makes up for it in all readers":
            config.get("use_rslora"),
        "The text encoders were trained instead of a source embedding; the one saved is their output for the caption":
            config.get("train_text_encoder"),
        f"Prompts name the subject by a learned token, {token}, whose embedding is in files beside the LoRA": token,
    }  # fmt: skip
    return [note for note, holds in notes.items() if holds]


def _kept(kept: Any) -> str:
    values = kept if isinstance(kept, Mapping) else {}
    update, updates, score = (values.get(key) for key in ("update", "updates", "score"))
    known = isinstance(update, int) and isinstance(updates, int) and isinstance(score, int | float)
    return f"{score:.3f} after update {update} of {updates}" if known else "as the metadata says"


def _percent(share: Any) -> str:
    return f"{100 * share:g} %" if isinstance(share, int | float) else ""
