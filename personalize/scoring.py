"""What a candidate picture is worth: how far the edit is there, against how much of the source is still there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from PIL import Image
from torch import Tensor
from torch.nn.functional import cosine_similarity

CLIP_WEIGHT = 2.5


@dataclass(frozen=True)
class Request:
    """An edit as a scorer sees it: the target `prompt`, the `caption` of the `source` picture, and that picture."""

    prompt: str
    caption: str
    source: Image.Image


@dataclass(frozen=True)
class Reading:
    """Scores of one picture: `edit` and `identity` in [0, 1], its `distance` from the source as a whole, and `facts`.

    `identity` may leave out what the prompt is to change, `distance` never does: it tells copies of the source.
    """

    edit: float
    identity: float
    distance: float
    facts: Mapping[str, float] = field(default_factory=dict)

    @property
    def score(self) -> float:
        """√(edit · identity): a picture that lacks one of the two is worth nothing."""
        return (max(0.0, self.edit) * max(0.0, self.identity)) ** 0.5


class Scorer(Protocol):
    """Reads pictures for a request; `name` says what it is made of.

    `copy`: a picture without the edit is a copy of the source if its distance is below; `lost`: one with the edit has
    lost the source if its identity is below 1 − lost.
    """

    name: str
    copy: float
    lost: float

    def __call__(self, pictures: Sequence[Image.Image], request: Request) -> list[Reading]: ...


def clip_score(image: Tensor, text: Tensor) -> Tensor:
    """CLIPScore = 2.5 · max(cos, 0) of image and text embeddings (b, d), (b,).

    References: Hessel et al., arXiv 2104.08718, eq. 1.
    """
    return CLIP_WEIGHT * cosine_similarity(image, text, dim=-1).clamp_min(0)
