"""Keep the best weights of a run: its validation pictures are scored, and the weights that drew the best are saved.

score = mean over the pictures of √(edit · identity)          see `evaluation.scoring.Scores`
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from personalize.adapters.captions import nearest_caption
from personalize.evaluation.scorers import find_scorer
from personalize.evaluation.scoring import Request, Scorer
from personalize.models.prompts import align_prompt
from personalize.models.stable_diffusion import StableDiffusion
from personalize.training.averaging import replaced

PREFIX = "best."  # of the names in checkpoints
NUMBERS, SCORE = f"{PREFIX}numbers", f"{PREFIX}score"


@dataclass(frozen=True)
class Judge:
    """Scores validation pictures: how far they show the edit, and how much of the source picture they keep."""

    scorer: Scorer
    request: Request
    about: Mapping[str, Any]

    def __call__(self, pictures: Sequence[Image.Image]) -> float:
        scores = [found.score for found in self.scorer(pictures, self.request)]
        return sum(scores) / len(scores)


def find_judge(
    config: Any, model: StableDiffusion, pictures: Sequence[tuple[Image.Image, str]], tokens: Sequence[str] = ()
) -> Judge | None:
    """The judge of a trainer's options, None without keep_best; `tokens` are learned words, which no scorer knows.

    `pictures` are those that are trained on, each with its caption: validation pictures are compared with the one
    whose caption is nearest to their prompt, from which they start (see `Editor.edit`).

    Raises:
        UserError: no scorer is known for the base model, one cannot be loaded, or it knows no word of the prompt.
    """
    if not config.keep_best:
        return None
    source, caption = pictures[nearest_caption(config.validation_prompt, [words for _, words in pictures])]
    standalone = getattr(config, "without_source_embedding", True)  # then the prompt is no edit of the caption
    prompt = config.validation_prompt if standalone else align_prompt(config.validation_prompt, caption)
    request = Request(prompt, caption, source).without(tokens)
    scorer = find_scorer(model.name, config.clip_model, config.identity_model)  # on the CPU: the device is for training
    drawn = {"pictures": config.num_validation_images, "steps": config.preview_steps}
    judge = Judge(scorer, request, {"scorer": scorer.name, "prompt": request.prompt, **drawn})
    judge([source])  # raises before the training what would raise after its first pictures
    return judge


class BestWeights:
    """The trained tensors of the update with the best score so far, on the CPU; of equal scores that of the earliest.

    Attributes:
        update, score: of the best; 0 and −1 before the first score.
        judged: the last update that has a score.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], about: Mapping[str, Any]) -> None:
        self.parameters, self.about = dict(parameters), dict(about)
        self.values = {name: parameter.detach().to("cpu", copy=True) for name, parameter in parameters.items()}
        self.update, self.judged, self.score = 0, 0, -1.0

    def consider(self, update: int, score: float) -> bool:
        """Keep the parameters as they are now if `score` is the best so far; says whether it is."""
        self.judged, better = update, score > self.score
        if better:
            self.update, self.score = update, score
            for name, parameter in self.parameters.items():
                self.values[name].copy_(parameter.detach())
        return better

    def in_place(self) -> AbstractContextManager[None]:
        """Run the body with the best weights as the parameters, which are as before afterwards."""
        return replaced(self.parameters, self.values)

    def info(self, updates: int) -> dict[str, Any]:
        """Entries of the metadata of an adapter that has these weights, in a run of so many `updates`."""
        kept = {"update": self.update, "updates": updates, "score": round(self.score, 4), **self.about}
        return {"updates": self.update, "kept_best": kept}

    def state(self) -> dict[str, Tensor]:
        """All of it as tensors, by the names that they have in checkpoints."""
        numbers = torch.tensor([self.update, self.judged, self._criterion()])
        score = torch.tensor(self.score, dtype=torch.float64)
        return {f"{PREFIX}{name}": value for name, value in self.values.items()} | {
            NUMBERS: numbers, SCORE: score,
        }  # fmt: skip

    def load(self, state: Mapping[str, Tensor]) -> bool:
        """Take over the `state` of a checkpoint; False if it has none, or scores of other pictures or networks."""
        if set(state) != set(self.state()):
            return False
        update, judged, criterion = state[NUMBERS].tolist()
        if criterion != self._criterion():
            return False
        self.update, self.judged, self.score = update, judged, float(state[SCORE])
        for name, value in self.values.items():
            value.copy_(state[f"{PREFIX}{name}"])
        return True

    def _criterion(self) -> int:
        """A number that is equal for scores that can be compared."""
        return int.from_bytes(sha256(json.dumps(self.about, sort_keys=True).encode()).digest()[:7])
