"""The base model of an adapter: which one it is, and what it predicts, as the adapter records it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from personalize.adapters.adapter import Adapter
from personalize.errors import Notice
from personalize.models.known_bases import find_base
from personalize.models.stable_diffusion import StableDiffusion


def load_base(
    adapter: Adapter, base: str | Path | None = None, *, allow_download: bool = False,
    prediction_type: str | None = None, **settings: Any,
) -> StableDiffusion:  # fmt: skip
    """Load `base`, or else the base that the adapter names; the very base it was trained on predicts what it did then.

    A `prediction_type` that is given goes first. A Notice says if the adapter was trained with another one.  Raises
    UserError as `find_base` and `StableDiffusion.load`, whose other arguments are `settings`.
    """
    if base is None:
        base = find_base(adapter.base, allow_download=allow_download)
        settings["local_files_only"] = not allow_download
    source = None if base in ("", "embedded") else base
    model = StableDiffusion.load(source, prediction_type=prediction_type, **settings)
    trained = trained_prediction(adapter, model) if prediction_type is None else None
    if trained not in (None, model.prediction_type):
        del model  # one base at a time
        model = StableDiffusion.load(source, prediction_type=trained, **settings)
    notice_other_prediction(adapter, model)
    return model


def trained_prediction(adapter: Adapter, model: StableDiffusion) -> str | None:
    """What `model` predicted when the adapter was trained on it; None if that is another base, or unknown.

    Another base predicts what it says itself, whatever the adapter's own did.
    """
    recorded = adapter.base.get("prediction_type")
    same = adapter.base.get("sha256") == model.identity["sha256"]
    return recorded if same and isinstance(recorded, str) else None


def notice_other_prediction(adapter: Adapter, model: StableDiffusion) -> None:
    """A Notice if the adapter was trained on a base that predicts something else than `model`."""
    recorded = adapter.base.get("prediction_type")
    if recorded in (None, model.prediction_type):
        return
    warnings.warn(
        f"the adapter was trained with prediction type {recorded}, {model.name or 'the base'} is used with "
        f"{model.prediction_type}: unless you know better, choose {recorded} there too",
        Notice, stacklevel=2,
    )  # fmt: skip
