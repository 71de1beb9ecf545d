"""What an edit of a photo is to change, and how: the request and its settings, apart from the work itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from personalize.editing import defaults
from personalize.editing.dynamic_prompt_learning.fit import DynamicSettings
from personalize.editing.dynamic_prompt_learning.leakage import AUTO_REGIONS, NounRegions
from personalize.editing.prompt_to_prompt.alignment import swap_words
from personalize.editing.prompt_to_prompt.control import ControlSettings
from personalize.editing.region import Box
from personalize.editing.uniform_attention import UniformSettings
from personalize.errors import UserError
from personalize.models.image_processor import Picture
from personalize.models.prompts import Tokens
from personalize.sampling.inversion import STRENGTH
from personalize.sampling.null_text import NullTextSettings


@dataclass(frozen=True)
class EditRequest:
    """The requested edit of a photo: a target prompt, words to swap in the source prompt, or weights of words alone.

    target: the target prompt, or empty if `swaps` or `weights` describe the edit; or several target prompts, which are
        edits of their own in one batch.
    swaps: (old, new) words or phrases of the source prompt.
    weights: factors on the attention to words of the target prompt.
    local: (word of the source, word of the target): the photo may change only where these words attend.
    mask: the photo may change only here: an image, white where it may, or a box (left, top, right, bottom) in pixels.
        It also replaces the mask that uniform maps compute.
    strict: for uniform maps without `mask`: keep the photo's own pixels outside the region that they compute.
    regions: for dynamic prompts: the nouns, and where each belongs.
    """

    target: str | Sequence[str] = ()
    swaps: Sequence[tuple[str, str]] = ()
    weights: Mapping[str, float] = field(default_factory=dict)
    local: Sequence[tuple[str, str]] = ()
    mask: Picture | Box | None = None
    strict: bool = False
    regions: NounRegions = AUTO_REGIONS

    def prompts(self, source: Tokens) -> list[str]:
        """The target prompts.

        Raises UserError if there is no edit, both a target and swaps, or a swapped word that the source lacks.
        """
        given = [self.target] if isinstance(self.target, str) else self.target
        targets = [target.strip() for target in given if target.strip()]
        if targets and self.swaps:
            raise UserError("a target and words to swap are two ways to say one thing: give one of them")
        if not targets and not self.swaps and not self.weights:
            raise UserError("nothing is to change: give a target prompt, words to swap, or weights of words")
        return targets or [swap_words(source, self.swaps)]


@dataclass(frozen=True)
class PhotoSettings:
    """How a photo is inverted and edited; see `invert` and `ControlSettings`. UserError for a wrong combination."""

    inversion: str = "direct"
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
    control: ControlSettings = ControlSettings()
    dynamic: DynamicSettings | None = None
    """Settings of dynamic prompts, or None for none; only with the controller p2p."""
    uniform: UniformSettings | None = None
    """Settings of uniform attention maps, or None for none."""
    resolution: int | None = None

    def __post_init__(self) -> None:
        if self.controller == "mutual" and self.dynamic is not None:
            raise UserError("mutual attention has no source prompt, so that no noun can be dynamic: use one of them")
        if self.inversion == "none" and (self.dynamic is not None or self.uniform is not None):
            raise UserError("dynamic prompts and uniform maps work along an inversion: choose another one than none")

    def guidance(self, base: str) -> float:
        """The guidance scale of the edit, for the base model of that name."""
        return defaults.guidance(base, self.inversion) if self.guidance_scale is None else self.guidance_scale

    def null_text_settings(self, base: str) -> NullTextSettings:
        """How null embeddings are fitted, for the base model of that name."""
        return self.null_text or defaults.settings_for(NullTextSettings, base)

    @property
    def inverted_share(self) -> float:
        """The share of the steps that is inverted, which depends on the inversion by default."""
        return STRENGTH.get(self.inversion, 1.0) if self.strength is None else self.strength


PHOTO_DEFAULTS = PhotoSettings()
