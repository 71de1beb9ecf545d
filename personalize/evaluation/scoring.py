"""Scores of candidate pictures: how far each shows the requested edit, and how much of the source it keeps."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from PIL import Image
from torch import Tensor
from torch.nn.functional import cosine_similarity

CLIP_WEIGHT = 2.5


@dataclass(frozen=True)
class Request:
    """What a scorer compares pictures with: the target `prompt`, the `source` picture, and that picture's `caption`."""

    prompt: str
    caption: str
    source: Image.Image

    def without(self, tokens: Iterable[str]) -> Request:
        """The request without the learned `tokens` in its texts, which no scorer knows."""
        texts = [self.prompt, self.caption]
        for token in tokens:
            texts = [re.sub(re.escape(token), " ", text, flags=re.IGNORECASE) for text in texts]
        prompt, caption = (" ".join(text.split()) for text in texts)
        return replace(self, prompt=prompt, caption=caption)


@dataclass(frozen=True)
class Scores:
    """Scores of one picture.

    edit: how far it shows the edit, in [0, 1].
    identity: how much of the source it keeps, in [0, 1]; regions that the prompt changes may be left out.
    distance: of the whole picture from the source, ≥ 0, with nothing left out; near 0 for a copy of the source.
    facts: further figures by name, for the report.
    """

    edit: float
    identity: float
    distance: float
    facts: Mapping[str, float] = field(default_factory=dict)

    @property
    def score(self) -> float:
        """√(edit · identity), in [0, 1]; 0 for a picture that lacks either of the two."""
        return (max(0.0, self.edit) * max(0.0, self.identity)) ** 0.5


class Scorer(Protocol):
    """Scores pictures for a request.

    name: the networks it uses, for the report.
    copy_distance: a picture without the edit is a copy of the source if its distance is below this.
    lost_distance: a picture with the edit has lost the source if its identity is below 1 − lost_distance.
    """

    name: str
    copy_distance: float
    lost_distance: float

    def __call__(self, pictures: Sequence[Image.Image], request: Request) -> list[Scores]: ...


def clip_score(image: Tensor, text: Tensor) -> Tensor:
    """CLIPScore, 2.5 · max(cos, 0), of image and text embeddings (b, d), as (b,).

    References: Hessel et al., arXiv 2104.08718, eq. 1.
    """
    return CLIP_WEIGHT * cosine_similarity(image, text, dim=-1).clamp_min(0)
