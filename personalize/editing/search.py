"""Search for the strengths of an edit that give the best image, within a budget of images.

The adapter is not trained again; images are sampled one by one, each with another seed, and each is scored by how well
it shows the edit and how much it keeps of the source.  Where the edit does not show, what was learned hides it, so the
search looks for the least forgetting with which it shows:

1.  An eighth of the budget, one to eight images, tries vector projection at several strengths without forgetting.
2.  As long as no image shows the edit, the adapter is removed from the decoder, from decoder and encoder, and from the
    encoder; then the edit is made stronger, and at last vector subtraction takes the place of projection.
3.  Once images show it, the best of them is improved.  If the adapter was removed somewhere, a share of it is kept
    there: half way to the smallest share that hid the edit or scored worse.  After that, every other image has other
    strengths, those that keep more of the source first, and the rest repeat the best ones with other seeds.

Rules that select no layer of the adapter are left out.  For an adapter without a source embedding alpha, beta and gamma
change nothing, so that the search is one over forgetting and seeds.  Equal seeds give equal searches.

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


# Of an image: it shows the edit and the source; a copy of the source; the edit without the source; neither.
State = Literal["good", "copy", "lost", "neither"]
SUCCESS = 0.5  # least Scores.edit of an image that shows the edit
SWEEP = ((0.8, 1.2), (0.9, 0.8), (0.7, 1.4), (0.9, 1.2), (0.7, 1.0), (0.9, 1.4), (0.7, 0.8), (0.7, 1.2))
ATTEMPTS = (  # forgetting rule, alpha and beta, in this order
    ("nodecoder", 0.8, 1.2), ("nodecoder", 0.9, 1.2), ("nodecoder", 0.7, 1.2),
    ("nodecoder+noencoder", 0.8, 1.2), ("noencoder", 0.8, 0.9),
)  # fmt: skip
STRONGER = ((0.7, 1.6), (0.6, 1.6), (0.5, 2.0))  # alpha and beta of edits that do not show even so
GAMMAS = (1.0, 1.2, 0.8)
NEAR = ((0.1, -0.4), (0.1, 0.0), (0.0, 0.2), (-0.1, 0.2), (0.0, -0.2), (0.2, 0.0))  # added to alpha and beta
LEAST_BETA = 0.8  # that keeping more of the source goes down to
FINEST = 0.2  # least change of the share of the adapter that is kept


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
    rules, trials = usable_rules(editor), []
    judged = request.without(editor.adapter.concepts if editor.adapter else ())
    with editor.applied_throughout():
        for image_seed in range(seed, seed + budget):
            strengths = next_strengths(trials, budget, rules)
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
    """The state of an image with these scores, by the scorer's thresholds."""
    if scores.edit >= SUCCESS:
        return "lost" if scores.identity < 1 - scorer.lost_distance else "good"
    return "copy" if scores.distance < scorer.copy_distance else "neither"


def usable_rules(editor: DrawsEdits) -> tuple[str, ...]:
    """The forgetting rules of `ATTEMPTS` that match layers of the editor's adapter; none if it is not LoRA alone."""
    lora = editor.adapter.lora if editor.adapter and not editor.adapter.others else {}
    names = [key.removeprefix(PREFIX).removesuffix(".lora_A.weight") for key in lora if key.startswith(PREFIX)]
    names = [name for name in names if not name.endswith(".weight")]
    return tuple(rule for rule in dict.fromkeys(row[0] for row in ATTEMPTS) if _matches(editor, names, rule))


def _matches(editor: DrawsEdits, names: list[str], rule: str) -> bool:
    try:
        multipliers(editor.model.unet, names, parse_rule_sum(rule))
    except UserError:
        return False
    return True


def next_strengths(trials: Sequence[Trial], budget: int, rules: Sequence[str]) -> EditStrengths:
    """Strengths of the next image; `rules` are the usable ones of `ATTEMPTS`."""
    if len(trials) < min(max(1, budget // 8), len(SWEEP)):
        return EditStrengths(*SWEEP[len(trials)])
    shown = [trial for trial in trials if trial.scores.edit >= SUCCESS]
    return improvement(ranked(shown)[0], trials) if shown else attempt(trials, rules)


def attempt(trials: Sequence[Trial], rules: Sequence[str]) -> EditStrengths:
    """The next strengths for an edit that none of `trials` shows; in the end those that came nearest, once more."""
    nearest = max(trials, key=lambda trial: trial.scores.edit).strengths
    options = [EditStrengths(alpha, beta, forget=rule) for rule, alpha, beta in ATTEMPTS if rule in rules]
    options += [EditStrengths(alpha, beta, forget=nearest.forget) for alpha, beta in STRONGER]
    options += [EditStrengths(1.0, 1.0, gamma, nearest.forget) for gamma in GAMMAS]
    tried = {trial.strengths for trial in trials}
    return next((option for option in options if option not in tried), nearest)


def improvement(best: Trial, trials: Sequence[Trial]) -> EditStrengths:
    """Strengths that may be better than those of `best`, which shows the edit."""
    if (rule := keeping_more(best, trials)) is not None:
        return replace(best.strengths, forget=rule)
    tried = {trial.strengths for trial in trials}
    options = [near for near in neighbours(best.strengths) if near not in tried]
    return options[0] if options and len(trials) % 2 == 0 else best.strengths


def keeping_more(best: Trial, trials: Sequence[Trial]) -> str | None:
    """The forgetting rule of `best` with a larger share kept, half way to the smallest that was tried.

    What was tried with a larger share hid the edit or scored worse, for `best` is the best that shows it.  None if
    `best` forgets nothing, or if the share would be less than `FINEST` larger.
    """
    names, share = names_and_share(best.strengths.forget)
    others = [names_and_share(trial.strengths.forget) for trial in trials]
    worse = [kept for other, kept in others if other == names and kept > share]
    middle = (share + min([1.0, *worse])) / 2
    if not names or middle - share < FINEST:
        return None
    return "+".join(f"{name}={middle:g}" for name in names)


def names_and_share(forget: str) -> tuple[tuple[str, ...], float]:
    """The rules that a rule of the search joins, and the share of the adapter that they keep, the same in each."""
    rules = parse_rule_sum(forget)
    return tuple(rule.name for rule in rules), rules[0].degree if rules else 1.0


def neighbours(strengths: EditStrengths) -> list[EditStrengths]:
    """Strengths near good ones, those that keep more of the source first."""
    if strengths.gamma is not None:
        return [replace(strengths, gamma=round(strengths.gamma + step, 3)) for step in (-0.1, 0.1, -0.2, 0.2)]
    shifted = [(strengths.alpha + alpha, max(LEAST_BETA, strengths.beta + beta)) for alpha, beta in NEAR]
    return [replace(strengths, alpha=round(alpha, 3), beta=round(beta, 3)) for alpha, beta in shifted]
