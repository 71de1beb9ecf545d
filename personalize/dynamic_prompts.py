"""Dynamic prompt learning: nouns whose embeddings are nudged, step by step, until each looks at its own thing.

    L = λ_at L_at + λ_dj L_dj + λ_bg L_bg       over the rows v of the nouns in the text encoder's input table alone

All else is frozen.  At each step the rows start where the last step left them, and the loop ends as soon as all three
losses are below thresholds that tighten towards the clean end.

References: Wang et al., "Dynamic Prompt Learning: Addressing Cross-Attention Leakage for Text-Based Image Editing",
arXiv 2309.15664, eq. 6 to 10; settings as in its published runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from personalize.alignment import tokenize_prompt
from personalize.concepts import ConceptRows
from personalize.errors import UserError
from personalize.losses import smoothed
from personalize.model import Conditioning, StableDiffusion
from personalize.moves import Schedule, Step
from personalize.noun_groups import NounGroup, group_maps
from personalize.text_maps import stage_attention

SHARPNESS = 100.0  # of the softmax over words, before the balancing loss
HALF_SCALE = 2.0**12  # of the loss in half precision, whose gradients would be rounded to nothing
STEPS = 50  # of the published thresholds


def disjoint_loss(maps: Tensor) -> Tensor:
    """Mean over pairs i < j of cos(A_i, A_j), of noun maps (k, h, w): a scalar in [0, 1], 0 for a single noun."""
    flat = maps.flatten(1)
    first, second = torch.triu_indices(len(flat), len(flat), 1, device=flat.device)
    if len(first) == 0:
        return flat.sum() * 0
    return cosine_similarity(flat[first], flat[second], dim=-1).mean()


def background_loss(maps: Tensor, background: Tensor) -> Tensor:
    """Mean cosine of noun maps (k, h, w) with the background (h, w), or each with its own (k, h, w): in [0, 1].

    A uniform map has √(background's share of the cells).
    """
    theirs = background.to(maps.device, maps.dtype).flatten(-2) if background.ndim > 1 else background.to(maps)
    return cosine_similarity(maps.flatten(1), theirs.expand(len(maps), -1), dim=-1).mean()


def balancing_loss(maps: Tensor) -> Tensor:
    """How weak the weakest noun's peak is, a scalar:  max_k max(0, 1 − max_pixel (G ∗ S_k)).

    Args:
        maps: S (k, h, w), shares in [0, 1] of each noun among the words, as `sharpened` gives them.  G is a 3×3
            Gaussian of centre 0.332, edge 0.122, corner 0.045.
    """
    peaks = smoothed(maps).flatten(1).amax(1)
    return (1 - peaks).clamp(min=0).amax()


def sharpened(attention: Tensor, groups: Sequence[NounGroup]) -> Tensor:
    """S (k, h, w): softmax over the words of 100 · `attention` (h, w, l), summed over each noun's positions.

    The first and the last token are left out; the other end and padding tokens are not.
    """
    shares = (SHARPNESS * attention[..., 1:-1]).softmax(-1)
    return torch.stack([shares[..., [p - 1 for p in group.positions]].sum(-1) for group in groups])


@dataclass(frozen=True)
class DynamicSettings:
    """How noun rows are fitted.  UserError for a value out of its range."""

    updates: int = 21
    """Updates at each step at most; 0 fits nothing."""
    rate: float = 1e-3
    """AdamW's learning rate."""
    balancing: float = 1.0
    """λ_at: one word must win somewhere."""
    disjoint: float = 0.05
    """λ_dj: nouns look at different places.  Image-dependent; published runs used 0.005 to 0.2."""
    background: float = 0.05
    """λ_bg: nouns keep off the background."""
    words_only: bool = False
    """Let only the prompt's own tokens compete in the balancing loss, and not end and padding as published: for bases
    whose attention goes to the padding, where no word can win."""
    cap: float | None = None
    """How far a row may go from its word, as a share of the word's length; None is no limit."""

    def __post_init__(self) -> None:
        if self.updates < 0 or self.rate <= 0 or min(self.balancing, self.disjoint, self.background) < 0:
            raise UserError(f"dynamic prompts take a positive rate and no negative updates or weights, got {self}")

    @property
    def idle(self) -> bool:
        return self.updates == 0 or not (self.balancing or self.disjoint or self.background)


@dataclass(frozen=True)
class Leakage:
    """The three losses at one moment; `balancing`, `disjoint` and `background` lie in [0, 1], 0 is best."""

    balancing: float
    disjoint: float
    background: float

    def within(self, step: Step) -> bool:
        """Are all below the thresholds of `step`?"""
        limits = thresholds(step.index, step.count)
        return all(mine < limit for mine, limit in zip(vars(self).values(), vars(limits).values(), strict=True))


def thresholds(index: int, count: int = STEPS) -> Leakage:
    """β exp(−i/α): with i the number of the step from the noisy end, in fiftieths of the way (eq. 10)."""
    i = index * STEPS / count
    return Leakage(0.3 * math.exp(-i / 25), 0.9 * math.exp(-i / 25), 0.7 * math.exp(-i / 50))


def leakage(attention: Tensor, groups: Sequence[NounGroup], background: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(balancing, disjoint, background) losses of `attention` (h, w, l); without a background the last is 0."""
    maps = group_maps(attention, groups)
    outside = maps.sum() * 0 if background is None else background_loss(maps, background)
    return balancing_loss(sharpened(attention, groups)), disjoint_loss(maps), outside


@contextmanager
def noun_rows(model: StableDiffusion, groups: Sequence[NounGroup]) -> Iterator[list[ConceptRows]]:
    """Run the body with the groups' vocabulary entries as small parameters (n, d); then the tables are as before.

    They start as the entries they stand for, so nothing changes until they do.  Every prompt that says the noun has it.
    """
    tables = [encoder.get_input_embeddings() for encoder in model.text_encoders]
    layers = []
    try:
        for number, (encoder, table) in enumerate(zip(model.text_encoders, tables, strict=True)):
            ids = list(dict.fromkeys(index for group in groups for index in group.ids[number]))
            with torch.no_grad():
                rows = table(torch.tensor([ids], device=model.device))[0]
            layers.append(ConceptRows(table, ids, rows, trainable=True).to(model.device))
            encoder.set_input_embeddings(layers[-1])
        yield layers
    finally:
        for encoder, table in zip(model.text_encoders, tables, strict=True):
            encoder.set_input_embeddings(table)


@dataclass
class DynamicPrompt:
    """Noun rows of every sampling step, for one photo and prompt.

    rows: for each step, for each text encoder, (n, d) fp32 on the CPU.  first, last: losses at a step before its first
    and its last update.  passes: forward passes of the UNet, backward: passes back through it.  drift: the largest
    ‖v − v₀‖ / ‖v₀‖ at each step.
    """

    prompt: str
    groups: tuple[NounGroup, ...]
    rows: list[tuple[Tensor, ...]] = field(default_factory=list)
    first: list[Leakage] = field(default_factory=list)
    last: list[Leakage] = field(default_factory=list)
    drift: list[float] = field(default_factory=list)
    passes: int = 0
    backward: int = 0

    @torch.no_grad()
    def conditionings(
        self, model: StableDiffusion, prompts: Sequence[str], size: tuple[int, int] | None = None
    ) -> list[Conditioning]:
        """What each step is told of `prompts`, a row each: their nouns, where they are the photo's, are dynamic."""
        with noun_rows(model, self.groups) as layers:
            return [self._encoded(model, layers, rows, prompts, size) for rows in self.rows]

    @staticmethod
    def _encoded(
        model: StableDiffusion, layers: list[ConceptRows], rows: tuple[Tensor, ...], prompts: Sequence[str],
        size: tuple[int, int] | None,
    ) -> Conditioning:  # fmt: skip
        for layer, row in zip(layers, rows, strict=True):
            layer.weight.copy_(row)
        return model.prompts(prompts, size)


class DynamicFit:
    """Fits noun rows while `denoise` runs: its `conditioning`; `found` holds what was found.

    Args:
        size: of the picture in pixels (H, W), for SDXL.
        background: where no noun belongs, (h, w); or for each noun its own, (k, h, w); None leaves that loss out.
    """

    def __init__(
        self, model: StableDiffusion, prompt: str, groups: Sequence[NounGroup], background: Tensor | None,
        settings: DynamicSettings = DynamicSettings(), size: tuple[int, int] | None = None,
    ) -> None:  # fmt: skip
        self.model, self.prompt, self.groups, self.size = model, prompt, tuple(groups), size
        self.background, self.settings = background, settings
        self.length = len(tokenize_prompt(model, prompt).ids) if settings.words_only else None
        self.found = DynamicPrompt(prompt, self.groups)
        self.told: Conditioning | None = None

    def __call__(self, step: Step, latents: Tensor) -> Conditioning:
        with noun_rows(self.model, self.groups) as layers:
            anchors = [layer.weight.detach().clone() for layer in layers]
            if self.found.rows:
                for layer, row in zip(layers, self.found.rows[-1], strict=True):
                    layer.weight.data.copy_(row)
            if not self.settings.idle:
                self._fit(layers, anchors, step, latents[:1])
            self.found.rows.append(tuple(layer.weight.detach().cpu().clone() for layer in layers))
            self.found.drift.append(max(_drift(*pair) for pair in zip(layers, anchors, strict=True)))
            with torch.no_grad():
                self.told = self.model.prompts([self.prompt], self.size)
        return self.told

    def latest(self, step: Step, latents: Tensor) -> Conditioning:
        """What `step` was told, for what is fitted after it at the same step (null-text)."""
        assert self.told is not None
        return self.told

    @torch.enable_grad()
    def _fit(self, layers: list[ConceptRows], anchors: list[Tensor], step: Step, latents: Tensor) -> None:
        weights = [layer.weight for layer in layers]
        adam = torch.optim.AdamW(weights, lr=self.settings.rate)
        for number in range(self.settings.updates):
            told = self.model.prompts([self.prompt], self.size)
            attention = stage_attention(self.model, latents, step, told)[..., : self.length]
            losses = leakage(attention, self.groups, self.background)
            self.found.passes += 1
            now = Leakage(*(float(loss.detach()) for loss in losses))
            if number == 0:
                self.found.first.append(now)
                self.found.last.append(now)
            self.found.last[-1] = now
            if now.within(step):
                return
            balancing, disjoint, outside = losses
            total = self.settings.balancing * balancing + self.settings.disjoint * disjoint
            total = total + self.settings.background * outside
            scale = HALF_SCALE if self.model.dtype == torch.float16 else 1.0
            for weight, gradient in zip(weights, torch.autograd.grad(total * scale, weights), strict=True):
                weight.grad = gradient / scale
            self.found.backward += 1
            adam.step()
            self._hold(layers, anchors)

    def _hold(self, layers: list[ConceptRows], anchors: list[Tensor]) -> None:
        if self.settings.cap is None:
            return
        for layer, anchor in zip(layers, anchors, strict=True):
            away = layer.weight.data - anchor
            share = self.settings.cap * anchor.norm(dim=-1, keepdim=True) / away.norm(dim=-1, keepdim=True)
            layer.weight.data.copy_(anchor + away * share.clamp(max=1))


def fit_on_trajectory(fit: DynamicFit, latents: Tensor, down: Schedule) -> DynamicPrompt:
    """Fit at every step of `down` on the photo's own trajectory, `latents` (t+1, 1, c, h, w) from clean to noisy.

    With direct inversion the source row is there anyway, so no sampling and no null embedding is needed.
    """
    for index, move in enumerate(down):
        step = Step(**vars(move), index=index, count=len(down))
        fit(step, latents[len(down) - index].to(fit.model.device))
    return fit.found


def _drift(layer: ConceptRows, anchor: Tensor) -> float:
    return float(((layer.weight.detach() - anchor).norm(dim=-1) / anchor.norm(dim=-1).clamp(min=1e-12)).max())
