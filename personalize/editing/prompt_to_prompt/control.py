"""Prompt-to-Prompt: gives the target rows of a batch the attention maps of the source row.

Cross-attention, for the share `cross_replace_steps` of the steps, with A (n, q, l) after the softmax:

    A_target ← c ⊙ (A_source M + A_target ⊙ own)

M (l, l) and own (l) say which tokens of the two prompts correspond (`Alignment`); c (l) are weights of words.

Self-attention, for the share `self_replace_steps` of the steps, in the layers whose maps have at most
`self_max_side` positions a side at the base's own size: A_target ← A_source, by giving the target the source's queries
and keys. The layers are the same for photos of every shape and size. The values remain the target's. The
source row (row 0) and the unconditional pass are not changed.

References: Hertz et al., "Prompt-to-Prompt Image Editing with Cross Attention Control", arXiv 2208.01626, §3; Yang et
al., "Dynamic Prompt Learning", arXiv 2309.15664, for giving an adjective the map of its noun.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from personalize.editing.config import CONTROL, ControlSettings
from personalize.editing.prompt_to_prompt.alignment import (
    adjective_bindings,
    differ_word_for_word,
    phrase_swaps,
    refinement_mapper,
    replacement_mapper,
    word_swaps,
)
from personalize.editing.prompt_to_prompt.local_blend import per_word, word_blend
from personalize.models.attention import AttentionHook, AttentionSite, attention_sites
from personalize.models.attention_maps import MapSum, stage_layers
from personalize.models.prompts import Span, Tokens, tokenize_prompt
from personalize.models.stable_diffusion import StableDiffusion
from personalize.models.transfer import sent
from personalize.sampling.denoise import LatentEdit


@dataclass(frozen=True)
class Alignment:
    """Which tokens of source and target correspond:  A′ = A_source `matrix` + A_target ⊙ `own`.

    `matrix` (l, l) and `own` (l,) are for the l positions of the text encoder; `mode` is replace or refine.
    """

    matrix: Tensor
    own: Tensor
    mode: str = "replace"


def align(
    source: Tokens, target: Tokens, length: int, settings: ControlSettings = CONTROL,
    swaps: Sequence[tuple[Span, Span]] = (),
) -> Alignment:  # fmt: skip
    """Align the tokens of `target` with those of `source`, for a text encoder of `length` positions.

    `swaps` are (source positions, target positions) of words that the user swapped; without them, words are compared.

    Raises:
        UserError: in mode replace, the prompts have different numbers of words.
    """
    exchanged = bool(swaps) or differ_word_for_word(source, target)
    mode = settings.mode if settings.mode != "auto" else "replace" if exchanged else "refine"
    if mode == "replace":
        pairs = [(_numbers(source, old), _numbers(target, new)) for old, new in swaps or word_swaps(source, target)]
        source_ids, target_ids = ([*tokens.ids, *[-1] * (length - len(tokens.ids))] for tokens in (source, target))
        aligned = replacement_mapper(source_ids, target_ids, pairs)
        return Alignment(_at_places(aligned, source, target), torch.zeros(length), mode)
    mapper, alphas = refinement_mapper(source.ids, target.ids)
    matrix, own, places = torch.eye(length), torch.zeros(length), list(target.places)
    own[places], matrix[:, places] = 1 - alphas, 0
    for place, number in zip(places, mapper.tolist(), strict=True):
        matrix[source.places[number], place] = float(number >= 0)
    for word, noun in adjective_bindings(source, target) if settings.bind_adjectives else ():
        for place in word:
            matrix[list(noun), place], own[place] = 1 / len(noun), 0.0
    return Alignment(matrix, own, mode)


def _numbers(tokens: Tokens, span: Span) -> Span:
    """The numbers among a prompt's tokens of text positions."""
    return tuple(tokens.places.index(position) for position in span)


def _at_places(aligned: Tensor, source: Tokens, target: Tokens) -> Tensor:
    """A matrix (l, l) by numbers of tokens as one by text positions, which differ where prompts have several chunks.

    The marks and the padding between chunks correspond to what is at the same position of the source.
    """
    if all(tokens.places == tuple(range(len(tokens.ids))) for tokens in (source, target)):
        return aligned
    matrix, places = torch.eye(len(aligned)), list(target.places)
    matrix[:, places] = 0
    matrix[torch.tensor(source.places)[:, None], places] = aligned[: len(source.ids), : len(places)]
    return matrix


class TextControl(AttentionHook):
    """Replaces the cross-attention maps of rows 1 … (the targets) by aligned maps of row 0 (the source).

    For each target: an alignment, weights c (l,), and for each token the first step `begin` (l,) at which its map is
    replaced and the step `end` (l,) from which it no longer is.
    """

    def __init__(
        self, alignments: Sequence[Alignment], weights: Sequence[Tensor], begin: Sequence[Tensor], end: Sequence[Tensor]
    ) -> None:
        self.matrix = torch.stack([one.matrix for one in alignments])[:, None]  # (b, 1, l, l)
        self.own = torch.stack([one.own for one in alignments])[:, None, None]  # (b, 1, 1, l)
        self.weights, self.begin, self.end = (torch.stack(list(rows))[:, None, None] for rows in (weights, begin, end))
        self._copies: Any = None  # (device and dtype, parts, patterns of steps), see `_placed`

    def wants(self, site: AttentionSite) -> bool:
        return site.cross

    def active(self, site: AttentionSite) -> bool:
        return site.branch == "cond" and bool(self._now(site.step.index).any())

    def probs(self, p: Tensor, site: AttentionSite) -> Tensor:
        source, target = p[:1], p[1:]
        now, matrix, own, weights = self._placed(site.step.index, p)
        changed = weights * (source @ matrix + target * own)
        return torch.cat([source, torch.where(now, changed, target)])

    def _now(self, index: int) -> Tensor:
        return (self.begin <= index) & (index < self.end)

    def _placed(self, index: int, like: Tensor) -> tuple[Tensor, ...]:
        """Which maps are replaced at step `index`, M, own and c, on the device of `like`: copied once, not by layer."""
        key = (like.device, like.dtype)
        if self._copies is None or self._copies[0] != key:
            parts = tuple(sent(part, like.device).to(like) for part in (self.matrix, self.own, self.weights))
            self._copies = (key, parts, {})
        _, parts, when = self._copies
        now = self._now(index)
        pattern = (bytes(now.flatten().tolist()), now.shape)
        if pattern not in when:
            when[pattern] = sent(now, like.device)
        return when[pattern], *parts


class SelfControl(AttentionHook):
    """Gives rows 1 … (the targets) the self-attention maps of row 0 (the source) before step number `end`.

    `layers` are names of self-attention layers, see `coarse_self_layers`.
    """

    def __init__(self, end: int, layers: Iterable[str]) -> None:
        self.end, self.layers = end, frozenset(layers)

    def wants(self, site: AttentionSite) -> bool:
        return site.name in self.layers

    def active(self, site: AttentionSite) -> bool:
        return site.branch == "cond" and site.step.index < self.end

    def qkv(self, q: Tensor, k: Tensor, v: Tensor, site: AttentionSite) -> tuple[Tensor, Tensor, Tensor]:
        return q[:1].expand_as(q), k[:1].expand_as(k), v


def coarse_self_layers(model: StableDiffusion, max_side: int) -> frozenset[str]:
    """Names of the self-attention layers whose maps have at most `max_side` positions a side at the base's own size."""
    sites = attention_sites(model.unet)
    return frozenset(name for name, site in sites.items() if not site.cross and site.side <= max_side)


@dataclass(frozen=True)
class Controls:
    """Hooks and latent edits of Prompt-to-Prompt for one source and its targets, to be put into an `Edit`.

    alignments: one for each target. source, targets: the tokenized prompts.
    maps: the cross-attention maps of all rows, if they were asked for.
    """

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
    settings: ControlSettings = CONTROL,
    swaps: Sequence[tuple[str, str]] = (),
    weights: Mapping[str, float] | None = None,
    blend: Sequence[tuple[str, str]] = (),
    keep_maps: bool = False,
) -> Controls:
    """Build the hooks and latent edits with which `targets` (rows 1 …) keep the layout of `source` (row 0).

    Args:
        steps: number of steps of the schedule.
        swaps: (phrase of the source, phrase of every target) that correspond; by default found by comparing words.
        weights: factors on the maps of words of the targets.
        blend: (word of the source, word of the targets): the targets may differ only in the regions of these words.
        keep_maps: collect the cross-attention maps, also without `blend`.

    Raises:
        UserError: a word is not in its prompt (the nearest word is named).
    """
    source_tokens = tokenize_prompt(model, source)
    target_tokens = tuple(tokenize_prompt(model, text) for text in ([targets] if isinstance(targets, str) else targets))
    length = max(tokens.length for tokens in (source_tokens, *target_tokens))
    alignments = tuple(
        align(source_tokens, one, length, settings, phrase_swaps(source_tokens, one, swaps) if swaps else ())
        for one in target_tokens
    )
    factors = [per_word(one, weights or {}, 1.0, length) for one in target_tokens]
    starts = {word: round(low * steps) for word, (low, _) in settings.word_steps.items()}
    ends = {word: round(high * steps) for word, (_, high) in settings.word_steps.items()}
    begin = [per_word(one, starts, 0, length) for one in target_tokens]
    end = [per_word(one, ends, round(settings.cross_replace_steps * steps), length) for one in target_tokens]
    hooks: list[AttentionHook] = [TextControl(alignments, factors, begin, end)]
    if self_end := round(settings.self_replace_steps * steps):
        hooks.append(SelfControl(self_end, coarse_self_layers(model, settings.self_max_side)))
    maps, edits = None, ()
    if blend:
        maps, blender = word_blend(
            model, source_tokens, target_tokens, blend, settings.blend_threshold, round(settings.blend_start * steps)
        )
        edits = (blender,)
    elif keep_maps:
        maps = MapSum(stage_layers(model))
    hooks += [] if maps is None else [maps]
    return Controls(tuple(hooks), edits, alignments, source_tokens, target_tokens, maps)
