"""Prompt-to-Prompt: the target rows of a batch look where the source row looks, as their prompts correspond.

Text attention, for the first `cross_replace_steps` of the steps, with A (n, q, l) after the softmax:

    A_target ← c ⊙ (A_source M + A_target ⊙ own)          M (l, l) and own (l) of an alignment, c (l) of re-weighting

Self-attention, for the first `self_replace_steps`, in layers of at most `self_max_queries` image positions:
A_target ← A_source, done by giving the target the source's queries and keys.  The values stay the target's own, and the
source row (row 0) and the null pass are never touched.

References: Hertz et al., "Prompt-to-Prompt Image Editing with Cross Attention Control", arXiv 2208.01626, §3; Yang et
al., "Dynamic Prompt Learning", arXiv 2309.15664, for adjectives that get their noun's map.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate, max_pool2d

from personalize.alignment import (
    Span,
    Tokens,
    adjective_bindings,
    phrase_swaps,
    refinement_mapper,
    replacement_mapper,
    tokenize_prompt,
    word_swaps,
)
from personalize.attention import AttentionHook, AttentionSite
from personalize.errors import UserError
from personalize.model import StableDiffusion
from personalize.moves import Step
from personalize.multi_concept import calibration_layers
from personalize.sampling import LatentEdit

__all__ = [
    "Alignment", "ControlSettings", "Controls", "LocalBlend", "MapSum", "SelfControl", "TextControl",
    "align", "controls", "refinement_mapper", "replacement_mapper",
]  # fmt: skip


@dataclass(frozen=True)
class ControlSettings:
    """How much of the source's attention the target gets; shares are of all steps.  UserError out of range."""

    mode: Literal["auto", "replace", "refine"] = "auto"
    """replace: word for word, of equally many.  refine: words put in or taken out.  auto: replace where it can be."""
    cross_replace_steps: float = 0.8
    """Share of the steps with the source's text maps."""
    self_replace_steps: float = 0.5
    """Share of the steps with the source's self-attention."""
    self_max_queries: int = 1024
    """Self-attention layers with more image positions than this keep their own."""
    bind_adjectives: bool = True
    """Words put in before a noun get the noun's map; only in refine."""
    word_steps: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Instead of `cross_replace_steps`, for words of the target: from which share of the steps to which."""
    blend_threshold: float = 0.3
    """Of the local blend: what of a word's map, relative to its maximum, belongs to it."""
    blend_start: float = 0.2
    """Share of the steps before the local blend begins."""

    def __post_init__(self) -> None:
        shares = {"cross_replace_steps": self.cross_replace_steps, "self_replace_steps": self.self_replace_steps,
                  "blend_threshold": self.blend_threshold, "blend_start": self.blend_start}  # fmt: skip
        for name, value in shares.items():
            if not 0 <= value <= 1:
                raise UserError(f"{name} is {value:g}: give a share from 0 to 1")
        if self.mode not in ("auto", "replace", "refine"):
            raise UserError(f"mode is {self.mode!r}: choose auto, replace or refine")


@dataclass(frozen=True)
class Alignment:
    """A′ = A_source `matrix` + A_target ⊙ `own`:  (l, l) and (l,), in the encoder's l positions; `mode` as chosen."""

    matrix: Tensor
    own: Tensor
    mode: str = "replace"


def align(
    source: Tokens, target: Tokens, length: int, settings: ControlSettings = ControlSettings(),
    swaps: Sequence[tuple[Span, Span]] = (),
) -> Alignment:  # fmt: skip
    """How `target` answers to `source`, for an encoder of `length` positions.

    `swaps` are pairs of positions, where the user said what is swapped for what; words are compared otherwise.

    Raises:
        UserError: mode replace, and the prompts have not equally many words.
    """
    equal = len(source.words) == len(target.words)
    mode = settings.mode if settings.mode != "auto" else "replace" if swaps or equal else "refine"
    if mode == "replace":
        ours, theirs = ([*tokens.ids, *[-1] * (length - len(tokens.ids))] for tokens in (source, target))
        matrix = replacement_mapper(ours, theirs, swaps or word_swaps(source, target))
        return Alignment(matrix, torch.zeros(length), mode)
    mapper, alphas = refinement_mapper(source.ids, target.ids)
    own = torch.cat([1 - alphas, torch.zeros(length - len(alphas))])
    found = torch.cat([mapper, torch.arange(len(mapper), length)])
    matrix = torch.zeros(length, length)
    kept = (own == 0).nonzero()[:, 0]
    matrix[found[kept], kept] = 1
    for word, noun in adjective_bindings(source, target) if settings.bind_adjectives else ():
        for place in word:
            matrix[list(noun), place], own[place] = 1 / len(noun), 0.0
    return Alignment(matrix, own, mode)


class TextControl(AttentionHook):
    """Text maps of rows 1 … from row 0: per target row an alignment, weights c (l,), first and last step (l,)."""

    def __init__(
        self, alignments: Sequence[Alignment], weights: Sequence[Tensor], begin: Sequence[Tensor], end: Sequence[Tensor]
    ) -> None:
        self.matrix = torch.stack([one.matrix for one in alignments])[:, None]  # (b, 1, l, l)
        self.own = torch.stack([one.own for one in alignments])[:, None, None]  # (b, 1, 1, l)
        self.weights, self.begin, self.end = (torch.stack(list(rows))[:, None, None] for rows in (weights, begin, end))

    def wants(self, site: AttentionSite) -> bool:
        return site.cross

    def active(self, site: AttentionSite) -> bool:
        return site.branch == "cond" and bool(self._now(site.step).any())

    def probs(self, p: Tensor, site: AttentionSite) -> Tensor:
        source, target = p[:1], p[1:]
        matrix, own, weights = (part.to(p) for part in (self.matrix, self.own, self.weights))
        changed = weights * (source @ matrix + target * own)
        return torch.cat([source, torch.where(self._now(site.step).to(p.device), changed, target)])

    def _now(self, step: Step) -> Tensor:
        return (self.begin <= step.index) & (step.index < self.end)


class SelfControl(AttentionHook):
    """Self-attention of rows 1 … from row 0, before step number `end`, in layers of at most `most` image positions."""

    def __init__(self, end: int, most: int) -> None:
        self.end, self.most = end, most

    def wants(self, site: AttentionSite) -> bool:
        return not site.cross and site.height * site.width <= self.most

    def active(self, site: AttentionSite) -> bool:
        return site.branch == "cond" and site.step.index < self.end

    def qkv(self, q: Tensor, k: Tensor, v: Tensor, site: AttentionSite) -> tuple[Tensor, Tensor, Tensor]:
        return q[:1].expand_as(q), k[:1].expand_as(k), v


class MapSum(AttentionHook):
    """Text maps of the conditional pass, summed over the steps so far: `mean` (b, h, w, l) is their mean.

    Those of `layers`, by default the layers nearest 16×16; heads and layers are averaged at once.
    """

    def __init__(self, layers: Sequence[str]) -> None:
        self.layers = frozenset(layers)
        self.sum: Tensor | None = None
        self.count = 0

    def wants(self, site: AttentionSite) -> bool:
        return site.name in self.layers

    def active(self, site: AttentionSite) -> bool:
        return site.branch in (None, "cond")

    def probs(self, p: Tensor, site: AttentionSite) -> Tensor:
        maps = p.detach().mean(1).unflatten(1, (site.height, site.width))
        self.sum = maps if self.sum is None else self.sum + maps
        self.count += 1
        return p

    def mean(self) -> Tensor:
        """Raises ValueError before the first prediction."""
        if self.sum is None:
            raise ValueError("no map has been seen yet: put the hook into the edit, and read it afterwards")
        return self.sum / self.count


class LocalBlend(LatentEdit):
    """Outside of where given words look, rows 1 … are the source row:  z ← z_source + m (z − z_source).

    m is the union of the source word's and the target word's region: the word's mean map so far, 3×3 max-pooled, as
    large as the latents, at least `threshold` of its maximum.

    Args:
        maps: fed by the same edit; it must come behind the hooks that change maps.
        words: (b, l) 0 or 1, for each row, the source's first, the tokens of the words.
        threshold: of the region.
        begin: number of the first step that is blended.
    """

    def __init__(self, maps: MapSum, words: Tensor, threshold: float, begin: int) -> None:
        self.maps, self.words, self.threshold, self.begin = maps, words, threshold, begin

    def latents(self, z: Tensor, step: Step) -> Tensor:
        if step.index < self.begin:
            return z
        return torch.where(self.mask((z.shape[-2], z.shape[-1])), z, z[:1])

    def mask(self, size: tuple[int, int]) -> Tensor:
        """Where rows keep their own latents, boolean (b, 1, h, w)."""
        mean = self.maps.mean()
        heat = (mean * self.words.to(mean)[:, None, None]).sum(-1)[:, None]
        heat = interpolate(max_pool2d(heat, 3, 1, 1), size, mode="nearest")
        region = heat >= self.threshold * heat.amax((-2, -1), keepdim=True)
        return region[:1] | region


@dataclass(frozen=True)
class Controls:
    """What goes into an `Edit` for one source and its targets; `maps` are the text maps of all rows, if asked for."""

    hooks: tuple[AttentionHook, ...]
    latent_edits: tuple[LatentEdit, ...]
    alignments: tuple[Alignment, ...]
    source: Tokens
    targets: tuple[Tokens, ...]
    maps: MapSum | None = None


def make_controls(
    model: StableDiffusion,
    source: str,
    targets: str | Sequence[str],
    *,
    steps: int,
    size: tuple[int, int],
    settings: ControlSettings = ControlSettings(),
    swaps: Sequence[tuple[str, str]] = (),
    weights: Mapping[str, float] | None = None,
    blend: Sequence[tuple[str, str]] = (),
    keep_maps: bool = False,
) -> Controls:
    """Hooks and latent edits that let `targets` (rows 1 …) keep the layout of `source` (row 0).

    Args:
        steps: of the moves they are for.
        size: of the latents, (h, w).
        swaps: phrases of the source and what stands for them in every target, where words alone do not tell.
        weights: factors on the maps of words of the targets.
        blend: (word of the source, word of the targets): only where these look may the targets differ.
        keep_maps: collect the text maps, also without `blend`.

    Raises:
        UserError: a word that is not in its prompt, naming the nearest, or a prompt of more than 77 tokens.
    """
    told = tokenize_prompt(model, source)
    asked = tuple(tokenize_prompt(model, text) for text in ([targets] if isinstance(targets, str) else targets))
    length = model.tokenizers[0].model_max_length
    alignments = tuple(
        align(told, one, length, settings, phrase_swaps(told, one, swaps) if swaps else ()) for one in asked
    )
    factors = [_per_word(one, weights or {}, 1.0, length) for one in asked]
    starts = {word: round(low * steps) for word, (low, _) in settings.word_steps.items()}
    ends = {word: round(high * steps) for word, (_, high) in settings.word_steps.items()}
    begin = [_per_word(one, starts, 0, length) for one in asked]
    end = [_per_word(one, ends, round(settings.cross_replace_steps * steps), length) for one in asked]
    hooks: list[AttentionHook] = [TextControl(alignments, factors, begin, end)]
    if self_end := round(settings.self_replace_steps * steps):
        hooks.append(SelfControl(self_end, settings.self_max_queries))
    maps = MapSum(calibration_layers(model.unet, size)) if blend or keep_maps else None
    edits: tuple[LatentEdit, ...] = ()
    if maps is not None:
        hooks.append(maps)
    if maps is not None and blend:
        marked = [_marked(told, [old for old, _ in blend], length)]
        marked += [_marked(one, [new for _, new in blend], length) for one in asked]
        edits = (LocalBlend(maps, torch.stack(marked), settings.blend_threshold, round(settings.blend_start * steps)),)
    return Controls(tuple(hooks), edits, alignments, told, asked, maps)


def _per_word(tokens: Tokens, values: Mapping[str, float], default: float, length: int) -> Tensor:
    """(l,): the value of each word's tokens, every occurrence of it."""
    found = torch.full((length,), float(default))
    for word, value in values.items():
        for span in tokens.find(word):
            found[list(span)] = float(value)
    return found


def _marked(tokens: Tokens, words: Sequence[str], length: int) -> Tensor:
    return _per_word(tokens, dict.fromkeys(words, 1.0), 0.0, length)
