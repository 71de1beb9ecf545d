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
    """Load `base`, or else the base that the adapter names, in the prediction type that the adapter was trained in.

    A `prediction_type` that is given goes first, with a Notice if it is another one.  Raises UserError as `find_base`
    and `StableDiffusion.load`, whose other arguments are `settings`.
    """
    if base is None:
        base = find_base(adapter.base, allow_download=allow_download)
        settings["local_files_only"] = not allow_download
    settings["prediction_type"] = prediction_type or trained_prediction(adapter)
    model = StableDiffusion.load(None if base in ("", "embedded") else base, **settings)
    notice_other_prediction(adapter, model)
    return model


def trained_prediction(adapter: Adapter | None) -> str | None:
    """The prediction type of the very base that the adapter was trained on; None if it does not say which that is.

    A file of another program may say how it was trained, but not on which weights: there the base knows better.
    """
    recorded = None if adapter is None else adapter.base.get("prediction_type")
    return recorded if adapter is not None and adapter.base.get("sha256") and isinstance(recorded, str) else None


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
