"""Settings that suit a base: the published ones, of Stable Diffusion, and those calibrated on the package's model.

Calibrated on scenes of the split "calibration/attention-maps", which no bench measures on, and then frozen.
"""

from __future__ import annotations

from typing import Any, TypeVar

from personalize.dynamic_prompts import DynamicSettings
from personalize.null_text import NullText

SettingsT = TypeVar("SettingsT", DynamicSettings, NullText)

EMBEDDED: dict[type, dict[str, Any]] = {
    # Seven tenths of this model's text attention goes to the padding.  With the published weights the balancing loss,
    # which wants every noun to beat the padding somewhere, drives nouns to where that is easy, the background, and IoU
    # with the true masks falls.  Overlap and background led instead; the rest is the smallest dose that was enough.
    DynamicSettings: {"updates": 4, "balancing": 0.05, "disjoint": 1.0, "background": 1.0, "cap": 0.5},
    # With 0.01 ten updates of a step end far from its target, at 0.28 of the uncorrected error in place of 0.07.
    NullText: {"rate": 0.1},
}


def suited(kind: type[SettingsT], base: str, **given: Any) -> SettingsT:
    """Settings of `kind` for the base of that name (`StableDiffusion.name`), but whatever of `given` is not None."""
    calibrated = EMBEDDED[kind] if base == "embedded" else {}
    return kind(**{**calibrated, **{name: value for name, value in given.items() if value is not None}})
