"""What an edit of a photo is to change, and how: the request and its settings, apart from the work itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from personalize.editing.dynamic_prompt_learning.leakage import AUTO_REGIONS, NounRegions
from personalize.editing.prompt_to_prompt.alignment import swap_words
from personalize.editing.region import Box
from personalize.errors import UserError
from personalize.models.image_processor import Picture
from personalize.models.prompts import Tokens
from personalize.models.ranges import LARGEST_WORD_WEIGHT


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

    def __post_init__(self) -> None:
        most = LARGEST_WORD_WEIGHT
        if wrong := [word for word, factor in self.weights.items() if not abs(factor) <= most]:
            raise UserError(f"the weight of {wrong[0]!r} is {self.weights[wrong[0]]}: give one from {-most} to {most}")

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
