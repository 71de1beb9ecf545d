"""Default settings that depend on the base model: published ones, and others for the embedded model.

Those for the embedded model were chosen once, before its last training, on scenes of the splits
"calibration/attention-maps", "calibration/report" and "calibration/photo", on which no bench measures.  What they are
worth on the weights that ship is in tests/bench/results.
"""

from __future__ import annotations

from typing import Any, TypeVar

from personalize.editing.config import DEFAULT_STRENGTHS, DynamicSettings, EditStrengths
from personalize.sampling.config import NullTextSettings

SettingsT = TypeVar("SettingsT", DynamicSettings, NullTextSettings)

EMBEDDED: dict[type, dict[str, Any]] = {
    # Most of this model's text attention goes to the padding. The balancing loss asks that every noun has more
    # attention than the padding somewhere; with its published weight it drove nouns to the background, where that is
    # easy. Few updates and a cap, because embeddings far from their words made the maps worse.
    # balancing_limit lies between the median balancing losses of scenes that show two named objects, and of those where
    # the second noun names nothing.
    DynamicSettings: {
        "updates": 4,
        "balancing": 0.05,
        "disjoint": 1.0,
        "background": 1.0,
        "cap": 0.5,
        "balancing_limit": 0.8,
    },
    # At the published rate of 0.01 ten updates correct less of a step's error.
    NullTextSettings: {"rate": 0.1},
}

# Guidance scales of edits and of text-to-image. On the embedded model the published 7.5 (ddpm: 15) oversaturates,
# distorts faces and changes more of the background; smaller ones than these were no better. To compare:
# python -m tests.bench.real_image_editing --guidance_scale 7.5
GUIDANCE = {"embedded": 4.0, "published": 7.5}
AFTER_DDPM = {"embedded": 6.0, "published": 15.0}
# Without inversion, as InfEdit is published for few-step models. On the embedded model the target is speckled at 4 and
# leaves the source's place.
WITHOUT_INVERSION = 2.0


def guidance(base: str, inversion: str) -> float:
    """Default guidance scale for editing a photo after `inversion`, for the base model of that name."""
    if inversion == "none":
        return WITHOUT_INVERSION
    return AFTER_DDPM[_kind(base)] if inversion == "ddpm" else GUIDANCE[_kind(base)]


def text_to_image_guidance(base: str) -> float:
    """Default guidance scale for sampling from noise, for the base model of that name."""
    return GUIDANCE[_kind(base)]


def largest_dial(strengths: EditStrengths | None, guidance_scale: float) -> str:
    """The dial of an edit that is the furthest above what is usual, with its value, for an error message."""
    usual = {name: getattr(DEFAULT_STRENGTHS, name) for name in ("alpha", "beta", "strength")}
    usual |= {"gamma": 1.0, "guidance_scale": GUIDANCE["published"]}
    values = {name: getattr(strengths, name, None) for name in usual} | {"guidance_scale": guidance_scale}
    share = {name: abs(value) / usual[name] for name, value in values.items() if value is not None}
    name = max(share, key=share.__getitem__)
    return f"{name}, which is {values[name]:g}"


def _kind(base: str) -> str:
    """Which column of the tables above applies to the base model of that name."""
    return "embedded" if base == "embedded" else "published"


def settings_for(kind: type[SettingsT], base: str, **given: Any) -> SettingsT:
    """Settings of class `kind` for the base model of that name (`StableDiffusion.name`).

    `given` are fields of `kind`; those that are not None take the place of the default.
    """
    calibrated = EMBEDDED[kind] if base == "embedded" else {}
    return kind(**{**calibrated, **{name: value for name, value in given.items() if value is not None}})
