"""How a photo is inverted and edited: the settings of `personalize edit PHOTO`; read before torch is imported."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from personalize.editing import defaults
from personalize.editing.config import CONTROL, ControlSettings, DynamicSettings, UniformSettings
from personalize.errors import UserError
from personalize.models.ranges import check_ranges
from personalize.sampling.config import STRENGTH, NullTextSettings


@dataclass(frozen=True)
class PhotoSettings:
    """How a photo is inverted and edited; see `invert` and `ControlSettings`. UserError for a wrong combination."""

    inversion: Literal["direct", "ddim", "negative", "null-text", "ddpm", "none"] = "direct"
    steps: int = 50
    strength: float | None = None
    """Share of the steps that is inverted and sampled, at the clean end; by default 1, with ddpm 0.64."""
    guidance_scale: float | None = None
    """Guidance scale of the edit; by default 7.5, with ddpm 15; on the embedded model 4, with ddpm 6; with none 2."""
    seed: int = 0
    null_text: NullTextSettings | None = None
    """How null embeddings are fitted; by default as in `personalize.editing.defaults` for the base model."""
    fixed_point: int = 0
    """Fixed-point iterations at each inversion step."""
    controller: Literal["p2p", "mutual"] = "p2p"
    """Prompt-to-Prompt, or mutual self-attention; the latter inverts with the empty prompt, as published."""
    control: ControlSettings = CONTROL
    dynamic: DynamicSettings | None = None
    """Settings of dynamic prompts, or None for none; only with the controller p2p."""
    uniform: UniformSettings | None = None
    """Settings of uniform attention maps, or None for none."""
    resolution: int | None = None

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.controller == "mutual" and self.dynamic is not None:
            raise UserError("mutual attention has no source prompt, so that no noun can be dynamic: use one of them")
        if self.inversion == "none" and (self.dynamic is not None or self.uniform is not None):
            raise UserError("dynamic prompts and uniform maps work along an inversion: choose another one than none")
        if self.fixed_point and self.inversion in ("ddpm", "none"):
            raise UserError(f"there are no fixed-point iterations of {self.inversion}: leave them at 0")
        if self.strength is None and int(self.steps * self.inverted_share) < 1:
            share = f"{self.inverted_share:.0%} of the steps, which is none of {self.steps}"
            raise UserError(f"{self.inversion} carries out {share}: take {math.ceil(1 / self.inverted_share)} or more")

    def guidance(self, base: str) -> float:
        """The guidance scale of the edit, for the base model of that name."""
        return defaults.guidance(base, self.inversion) if self.guidance_scale is None else self.guidance_scale

    def null_text_settings(self, base: str) -> NullTextSettings:
        """How null embeddings are fitted, for the base model of that name."""
        return self.null_text or defaults.settings_for(NullTextSettings, base)

    def resolved(self, base: str, resolution: int) -> PhotoSettings:
        """These settings with the values that what is None has for the base model of that name and resolution."""
        given = {"guidance_scale": self.guidance(base), "null_text": self.null_text_settings(base),
                 "strength": self.inverted_share, "resolution": self.resolution or resolution}  # fmt: skip
        return replace(self, **given)

    @property
    def inverted_share(self) -> float:
        """The share of the steps that is inverted, which depends on the inversion by default."""
        return STRENGTH.get(self.inversion, 1.0) if self.strength is None else self.strength


PHOTO_DEFAULTS = PhotoSettings()
