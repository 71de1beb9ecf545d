"""Options that name a base model and its precision; every command and trainer has them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class BaseModelOptions:
    """Options that choose the base model."""

    pretrained_model_name_or_path: str | None = None
    """Base: a diffusers folder, hub id or single-file checkpoint; by default the adapter's own, or the package's."""
    revision: str | None = None
    """Revision of a base from the hub."""
    variant: str | None = None
    """Variant of the base's files, e.g. fp16."""
    prediction_type: Literal["epsilon", "v_prediction"] | None = None
    """What the base's UNet predicts; if not given, what the base says, or what one forward pass shows."""


@dataclass(frozen=True, kw_only=True)
class InferenceOptions(BaseModelOptions):
    """Options of every command that draws pictures."""

    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """Precision of the base model: "no" is fp32; if not given, bf16 on GPUs that support it, else fp32."""
    cpu: bool = False
    """Run on the CPU even if there is an accelerator."""
