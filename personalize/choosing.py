"""Choosing the strengths of an edit: a search under a budget of pictures, edit success weighed against identity.

Learning is done once; only sampling is searched.  The procedure, one picture at a time:

1.  Half of the budget goes over projection strengths without forgetting, each with a seed of its own.
2.  From then on the best picture so far says what to try next:
    copy     the source comes back, the edit does not: forget more, decoder and encoder in turn, attention kept first
    lost     the edit is there, the source is not: forget less, keep more of the source (alpha up)
    neither  other seeds, then subtraction in the place of projection
    good     the same seed with slightly other strengths, and other seeds

Everything follows from the seed.  Which thresholds separate the four is the scorer's business.

References: Zhang et al., "Forgedit", arXiv 2309.10556 (the strategies and their ranges; the procedure is ours).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from PIL import Image

from personalize.errors import UserError
from personalize.lora import PREFIX, multipliers
from personalize.scoring import Request, Scorer, Scores
from personalize.settings import DEFAULT_SAMPLING, EditStrengths, Sampling, parse_rule_sum

if TYPE_CHECKING:
    from personalize.editor import Editor

State = Literal["good", "copy", "lost", "neither"]
SUCCESS = 0.5  # of Reading.edit
SWEEP = ((0.8, 1.2), (0.9, 0.8), (0.7, 1.4), (0.9, 1.2), (0.7, 1.0), (0.9, 1.4), (0.7, 0.8), (0.7, 1.2))
STRONGER = ("decoderattn", "encoderattn", "decoderkv", "encoderkv", "nodecoder", "noencoder")  # by what they take away
ATTENTION_ONLY = ("nodecoderselfattn", "noencoderselfattn", "nodecoderkv", "nodecoder", "noencoder")
WEAKER = {"decoderattn": "decoderattn+decoder2", "encoderattn": "encoderattn+encoder1"}
ENCODER_BETA, DECODER_BETA = 0.9, 1.2  # what went with forgetting on each side in the published results
GAMMAS = (0.8, 1.0, 1.2)


@dataclass(frozen=True)
class Trial:
    """One picture of the search, and what the scorer made of it."""

    setting: EditStrengths
    seed: int
    picture: Image.Image
    reading: Scores
    state: State


def search(
    editor: Editor,
    request: Request,
    scorer: Scorer,
    *,
    budget: int,
    seed: int = 0,
    negative_prompt: str = "",
    sampling: Sampling = DEFAULT_SAMPLING,
) -> Iterator[Trial]:
    """Draw `budget` pictures one by one, each chosen by what was seen so far, and yield them in that order.

    Raises:
        UserError: a budget below 1, or what `Editor.edit` refuses.
    """
    if budget < 1:
        raise UserError(f"--budget must be at least 1 picture, got {budget}")
    ladder, tried = usable_rules(editor), []
    with editor.applied_throughout():
        for _ in range(budget):
            setting, number = next_proposal(tried, budget, ladder, seed)
            picture = editor.edit(
                request.prompt, setting, seeds=[number], negative_prompt=negative_prompt, sampling=sampling
            )[0]
            reading = scorer([picture], request)[0]
            tried.append(Trial(setting, number, picture, reading, state(reading, scorer)))
            yield tried[-1]


def ranked(trials: Iterable[Trial]) -> list[Trial]:
    """The best first; of equal ones, those that were drawn earlier."""
    return sorted(trials, key=lambda trial: -trial.scores.score)


def state(reading: Scores, scorer: Scorer) -> State:
    """What a picture suffers from, by the scorer's thresholds."""
    if reading.edit >= SUCCESS:
        return "lost" if reading.identity < 1 - scorer.lost_distance else "good"
    return "copy" if reading.distance < scorer.copy_distance else "neither"


def usable_rules(editor: Editor) -> tuple[str, ...]:
    """Rules of growing strength that select something of the editor's adapter."""
    lora = editor.adapter.lora if editor.adapter else {}
    names = [key.removeprefix(PREFIX).removesuffix(".lora_A.weight") for key in lora if key.startswith(PREFIX)]
    names = [name for name in names if not name.endswith(".weight")]
    usable = [name for name in (*STRONGER, *ATTENTION_ONLY) if _selects(editor, names, name)]
    full = "decoderattn" in usable or "encoderattn" in usable
    return tuple(name for name in (STRONGER if full else ATTENTION_ONLY) if name in usable)


def _selects(editor: Editor, names: list[str], rule: str) -> bool:
    try:
        multipliers(editor.model.unet, names, parse_rule_sum(rule))
    except UserError:
        return False
    return True


def next_proposal(tried: Sequence[Trial], budget: int, ladder: Sequence[str], seed: int) -> tuple[EditStrengths, int]:
    """The next picture to draw: its setting and seed."""
    fresh = seed + len(tried)
    if len(tried) < min((budget + 1) // 2, len(SWEEP)):
        return EditStrengths(*SWEEP[len(tried)]), fresh
    best = ranked(tried)[0]
    done = {(trial.strengths, trial.seed) for trial in tried}
    settings = {trial.strengths for trial in tried}
    if best.state == "good":  # every third picture a new seed: luck counts as much as strengths
        options = [(setting, best.seed) for setting in finer(best.strengths)]
        if len(tried) % 3 == 0:
            return best.strengths, fresh
        return next((option for option in options if option not in done), (best.strengths, fresh))
    if best.state == "lost":
        options = [(setting, best.seed) for setting in gentler(best.strengths)]
        return next((option for option in options if option not in done), (best.strengths, fresh))
    others = forgetting(best.strengths, ladder) if best.state == "copy" else subtracting(best.strengths)
    return next(((setting, fresh) for setting in others if setting not in settings), (best.strengths, fresh))


def finer(setting: EditStrengths) -> list[EditStrengths]:
    """Neighbours of a good setting: more of the source, more of the edit, both, less of each."""
    if setting.gamma is not None:
        return [replace(setting, gamma=round(setting.gamma + step, 3)) for step in (-0.1, 0.1, -0.2, 0.2)]
    steps = ((0.1, 0.0), (0.0, 0.2), (0.1, 0.2), (0.0, -0.2), (0.2, 0.0), (-0.1, 0.0))
    return [_moved(setting, *step) for step in steps]


def gentler(setting: EditStrengths) -> list[EditStrengths]:
    """Settings that keep more of the source: weaker forgetting on the same side, then more alpha and less beta."""
    if setting.gamma is not None:
        return [replace(setting, gamma=round(setting.gamma - step, 3)) for step in (0.1, 0.2, 0.3)]
    name, _, degree = setting.forget.partition("=")
    weaker = [WEAKER[name]] if name in WEAKER else []
    weaker += [f"{name}=0.5"] if name != "none" and not degree else []
    steps = ((0.1, 0.0), (0.1, -0.2), (0.2, -0.2), (0.3, -0.4))
    return [*(replace(setting, forget=rule) for rule in weaker), *(_moved(setting, *step) for step in steps)]


def forgetting(setting: EditStrengths, ladder: Sequence[str]) -> list[EditStrengths]:
    """Settings that forget more than `setting` does, in growing strength; then more of the edit."""
    name = setting.forget.partition("=")[0]
    further = ladder[ladder.index(name) + 1 :] if name in ladder else ladder
    more = [EditStrengths(0.8, DECODER_BETA if "decoder" in rule else ENCODER_BETA, forget=rule) for rule in further]
    return [*more, *(_moved(setting, alpha, beta) for alpha, beta in ((0.0, 0.4), (-0.1, 0.4), (-0.2, 0.6)))]


def subtracting(setting: EditStrengths) -> list[EditStrengths]:
    """Other ways to the edit: subtraction, with the same forgetting."""
    return [EditStrengths(1.0, 1.0, gamma, setting.forget) for gamma in GAMMAS]


def _moved(setting: EditStrengths, alpha: float, beta: float) -> EditStrengths:
    return replace(setting, alpha=round(setting.alpha + alpha, 3), beta=round(max(0.1, setting.beta + beta), 3))
