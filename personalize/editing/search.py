"""Search for the strengths of an edit that give the best image, within a budget of images.

The adapter is not trained again; the search samples images one by one and scores how well each shows the edit and how
much it keeps of the source:

1.  The first half of the budget tries vector projection at several strengths without forgetting, each with another
    seed.
2.  After that, the state of the best image so far decides what is tried next:
    copy     it shows the source without the edit: forget more, in the decoder and the encoder in turn, and first with
             the rules that keep the attention layers
    lost     it shows the edit, but the source is lost: forget less, keep more of the source (larger alpha)
    neither  it shows neither: vector subtraction in place of projection, then other seeds
    good     it shows both: slightly different strengths with the same seed, and other seeds

Equal seeds give equal searches. The thresholds between the states belong to the scorer.

References: Zhang et al., "Forgedit", arXiv 2309.10556 (the strategies and their ranges; the procedure is ours).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from PIL import Image

from personalize.adapters.adapter import Adapter
from personalize.adapters.forgetting import parse_rule_sum
from personalize.adapters.lora import PREFIX
from personalize.adapters.lora_scales import multipliers
from personalize.editing.config import DEFAULT_SAMPLING, EditStrengths, Sampling
from personalize.errors import UserError
from personalize.evaluation.scoring import Request, Scorer, Scores
from personalize.models.stable_diffusion import StableDiffusion


class DrawsEdits(Protocol):
    """What the search needs of an `Editor`: its model and adapter, and images of a prompt at given strengths."""

    model: StableDiffusion
    adapter: Adapter | None

    def applied_throughout(self) -> AbstractContextManager[Any]: ...

    def edit(
        self,
        prompt: str,
        strengths: EditStrengths,
        *,
        seeds: Sequence[int],
        negative_prompt: str,
        sampling: Sampling,
    ) -> list[Image.Image]: ...


State = Literal["good", "copy", "lost", "neither"]
SUCCESS = 0.5  # least Scores.edit of an image that shows the edit
SWEEP = ((0.8, 1.2), (0.9, 0.8), (0.7, 1.4), (0.9, 1.2), (0.7, 1.0), (0.9, 1.4), (0.7, 0.8), (0.7, 1.2))
# Forgetting rules, the weakest first.
STRONGER = ("decoderattn", "encoderattn", "decoderkv", "encoderkv", "nodecoder", "noencoder")
ATTENTION_ONLY = ("nodecoderselfattn", "noencoderselfattn", "nodecoderkv", "nodecoder", "noencoder")
WEAKER = {"decoderattn": "decoderattn+decoder2", "encoderattn": "encoderattn+encoder1"}
ENCODER_BETA, DECODER_BETA = 0.9, 1.2  # published with forgetting of the encoder and of the decoder
GAMMAS = (0.8, 1.0, 1.2)


@dataclass(frozen=True)
class Trial:
    """One image of the search, with its strengths, seed and scores."""

    strengths: EditStrengths
    seed: int
    picture: Image.Image
    scores: Scores
    state: State


def search(
    editor: DrawsEdits,
    request: Request,
    scorer: Scorer,
    *,
    budget: int,
    seed: int = 0,
    negative_prompt: str = "",
    sampling: Sampling = DEFAULT_SAMPLING,
) -> Iterator[Trial]:
    """Sample `budget` images one by one, each with strengths chosen by the scores so far, and yield them in that order.

    Raises:
        UserError: the budget is below 1, or `Editor.edit` refuses the prompt.
    """
    if budget < 1:
        raise UserError(f"--budget must be at least 1 picture, got {budget}")
    ladder, trials = usable_rules(editor), []
    judged = request.without(editor.adapter.concepts if editor.adapter else ())
    with editor.applied_throughout():
        for _ in range(budget):
            strengths, image_seed = next_proposal(trials, budget, ladder, seed)
            picture = editor.edit(
                request.prompt, strengths, seeds=[image_seed], negative_prompt=negative_prompt, sampling=sampling
            )[0]
            scores = scorer([picture], judged)[0]
            trials.append(Trial(strengths, image_seed, picture, scores, state(scores, scorer)))
            yield trials[-1]


def ranked(trials: Iterable[Trial]) -> list[Trial]:
    """Trials by score, the best first; equal scores stay in the order of sampling."""
    return sorted(trials, key=lambda trial: -trial.scores.score)


def state(scores: Scores, scorer: Scorer) -> State:
    """The state of an image with these scores, by the scorer's thresholds; the states are listed above."""
    if scores.edit >= SUCCESS:
        return "lost" if scores.identity < 1 - scorer.lost_distance else "good"
    return "copy" if scores.distance < scorer.copy_distance else "neither"


def usable_rules(editor: DrawsEdits) -> tuple[str, ...]:
    """The forgetting rules that match layers of the editor's adapter, the weakest first."""
    lora = editor.adapter.lora if editor.adapter else {}
    names = [key.removeprefix(PREFIX).removesuffix(".lora_A.weight") for key in lora if key.startswith(PREFIX)]
    names = [name for name in names if not name.endswith(".weight")]
    usable = [name for name in (*STRONGER, *ATTENTION_ONLY) if _matches(editor, names, name)]
    full = "decoderattn" in usable or "encoderattn" in usable
    return tuple(name for name in (STRONGER if full else ATTENTION_ONLY) if name in usable)


def _matches(editor: DrawsEdits, names: list[str], rule: str) -> bool:
    try:
        multipliers(editor.model.unet, names, parse_rule_sum(rule))
    except UserError:
        return False
    return True


def next_proposal(trials: Sequence[Trial], budget: int, ladder: Sequence[str], seed: int) -> tuple[EditStrengths, int]:
    """Strengths and seed of the next image; `ladder` are the usable forgetting rules, the weakest first."""
    new_seed = seed + len(trials)
    if len(trials) < min((budget + 1) // 2, len(SWEEP)):
        return EditStrengths(*SWEEP[len(trials)]), new_seed
    best = ranked(trials)[0]
    done = {(trial.strengths, trial.seed) for trial in trials}
    tried = {trial.strengths for trial in trials}
    if best.state == "good":  # every third image tries a new seed, which matters as much as the strengths
        options = [(near, best.seed) for near in neighbours(best.strengths)]
        if len(trials) % 3 == 0:
            return best.strengths, new_seed
        return next((option for option in options if option not in done), (best.strengths, new_seed))
    if best.state == "lost":
        options = [(near, best.seed) for near in gentler(best.strengths)]
        return next((option for option in options if option not in done), (best.strengths, new_seed))
    others = more_forgetting(best.strengths, ladder) if best.state == "copy" else subtractions(best.strengths)
    return next(((other, new_seed) for other in others if other not in tried), (best.strengths, new_seed))


def neighbours(strengths: EditStrengths) -> list[EditStrengths]:
    """Strengths near good ones: more of the source, more of the edit, more of both, less of each."""
    if strengths.gamma is not None:
        return [replace(strengths, gamma=round(strengths.gamma + step, 3)) for step in (-0.1, 0.1, -0.2, 0.2)]
    steps = ((0.1, 0.0), (0.0, 0.2), (0.1, 0.2), (0.0, -0.2), (0.2, 0.0), (-0.1, 0.0))
    return [_shifted(strengths, *step) for step in steps]


def gentler(strengths: EditStrengths) -> list[EditStrengths]:
    """Strengths that keep more of the source: weaker forgetting in the same half, then more alpha and less beta."""
    if strengths.gamma is not None:
        return [replace(strengths, gamma=round(strengths.gamma - step, 3)) for step in (0.1, 0.2, 0.3)]
    name, _, degree = strengths.forget.partition("=")
    weaker = [WEAKER[name]] if name in WEAKER else []
    weaker += [f"{name}=0.5"] if name != "none" and not degree else []
    steps = ((0.1, 0.0), (0.1, -0.2), (0.2, -0.2), (0.3, -0.4))
    return [*(replace(strengths, forget=rule) for rule in weaker), *(_shifted(strengths, *step) for step in steps)]


def more_forgetting(strengths: EditStrengths, ladder: Sequence[str]) -> list[EditStrengths]:
    """Strengths that forget more, the weakest first; then larger beta and smaller alpha."""
    name = strengths.forget.partition("=")[0]
    further = ladder[ladder.index(name) + 1 :] if name in ladder else ladder
    more = [EditStrengths(0.8, DECODER_BETA if "decoder" in rule else ENCODER_BETA, forget=rule) for rule in further]
    return [*more, *(_shifted(strengths, alpha, beta) for alpha, beta in ((0.0, 0.4), (-0.1, 0.4), (-0.2, 0.6)))]


def subtractions(strengths: EditStrengths) -> list[EditStrengths]:
    """Vector subtraction in place of projection, with the same forgetting."""
    return [EditStrengths(1.0, 1.0, gamma, strengths.forget) for gamma in GAMMAS]


def _shifted(strengths: EditStrengths, alpha: float, beta: float) -> EditStrengths:
    return replace(strengths, alpha=round(strengths.alpha + alpha, 3), beta=round(max(0.1, strengths.beta + beta), 3))
