"""Dynamic prompt learning: at each step, fit the token embeddings of nouns so that each attends to its own object.

    L = λ_at L_at + λ_dj L_dj + λ_bg L_bg

Only the nouns' rows v of the text encoder's token embedding are trained. Each step starts at the rows of the step
before, and its updates end as soon as all three losses are below thresholds, which fall towards the clean end.

References: Wang et al., "Dynamic Prompt Learning: Addressing Cross-Attention Leakage for Text-Based Image Editing",
arXiv 2309.15664, eq. 6 to 10; settings as in its published runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from personalize.adapters.textual_inversion import TokenEmbedding
from personalize.editing.config import DYNAMIC, DynamicSettings
from personalize.editing.dynamic_prompt_learning.noun_groups import NounGroup, group_maps
from personalize.editing.dynamic_prompt_learning.stage_maps import stage_attention
from personalize.io.progress import ticked
from personalize.models.gradient_checkpointing import gradient_checkpointing
from personalize.models.loss_scaling import set_gradients
from personalize.models.map_filters import smoothed
from personalize.models.offloading import embedding_device
from personalize.models.prompts import tokenize_prompt
from personalize.models.stable_diffusion import Conditioning, StableDiffusion
from personalize.models.transfer import sent
from personalize.sampling.schedule import Schedule, Step

CHUNK = 77  # text positions of a chunk, with its start and end mark
SHARPNESS = 100.0  # factor on the attention before the softmax over words, for the balancing loss
STEPS = 50  # number of steps for which the thresholds were published


def disjoint_loss(maps: Tensor) -> Tensor:
    """How much nouns overlap: the mean of cos(A_i, A_j) over pairs of maps (k, h, w); in [0, 1], 0 for one noun."""
    flat = maps.flatten(1)
    first, second = torch.triu_indices(len(flat), len(flat), 1, device=flat.device)
    if len(first) == 0:
        return flat.sum() * 0
    return cosine_similarity(flat[first], flat[second], dim=-1).mean()


def background_loss(maps: Tensor, background: Tensor) -> Tensor:
    """How much nouns attend to the background: the mean cosine of their maps (k, h, w) with it; a scalar in [0, 1].

    `background` is (h, w), or (k, h, w) with one for each noun. The loss of a uniform map is the square root of the
    background's share of the cells.
    """
    flat = background.to(maps.device, maps.dtype).flatten(-2) if background.ndim > 1 else background.to(maps)
    return cosine_similarity(maps.flatten(1), flat.expand(len(maps), -1), dim=-1).mean()


def balancing_loss(maps: Tensor) -> Tensor:
    """How far the peak of the weakest noun is below 1:  max_k max(0, 1 − max_pixel (G ∗ S_k));  a scalar.

    Args:
        maps: S (k, h, w), each noun's share of the attention in [0, 1], as `sharpened` returns it. G is a 3×3 Gaussian
            with centre 0.332, edges 0.122 and corners 0.045.
    """
    peaks = smoothed(maps).flatten(1).amax(1)
    return (1 - peaks).clamp(min=0).amax()


def sharpened(attention: Tensor, groups: Sequence[NounGroup], until: int | None = None) -> Tensor:
    """S (k, h, w): softmax over the words of 100 · `attention` (h, w, l), summed over each noun's positions.

    The softmax is over all positions, padding included, except the first and the last of each chunk of 77, see
    `personalize.models.token_ids`: a start mark gets more of the attention than all words. `until` leaves out the
    positions from there on, such as the padding.
    """
    words = attention.unflatten(-1, (-1, CHUNK))[..., 1:-1].flatten(-2)
    shares = (SHARPNESS * words[..., : None if until is None else _words_before(until)]).softmax(-1)
    each = ([shares[..., _words_before(place)] for place in group.positions] for group in groups)  # no indices to copy
    return torch.stack([torch.stack(own, -1).sum(-1) for own in each])


def _words_before(position: int) -> int:
    """The number of positions before `position` that are no first or last one of a chunk."""
    chunk, inside = divmod(position, CHUNK)
    return chunk * (CHUNK - 2) + max(0, inside - 1)


@dataclass(frozen=True)
class Leakage:
    """The values of the three losses, each in [0, 1], where 0 is best."""

    balancing: float
    disjoint: float
    background: float

    def within(self, step: Step, balancing_limit: float | None = None) -> bool:
        """Whether all losses are below the thresholds of `step`; `balancing_limit` as in `thresholds`."""
        limits = thresholds(step.index, step.count, balancing_limit)
        nouns_apart = self.balancing < limits.balancing and self.disjoint < limits.disjoint
        return nouns_apart and self.background < limits.background


def thresholds(index: int, count: int = STEPS, balancing_limit: float | None = None) -> Leakage:
    """Thresholds of step `index` of `count`, in the order of sampling:  β exp(−i/α),  i = 50 index / count (eq. 10).

    balancing_limit: in place of 0.3 exp(−i/25), the same at every step.
    """
    i = index * STEPS / count
    balancing = 0.3 * math.exp(-i / 25) if balancing_limit is None else balancing_limit
    return Leakage(balancing, 0.9 * math.exp(-i / 25), 0.7 * math.exp(-i / 50))


def leakage(
    attention: Tensor, groups: Sequence[NounGroup], background: Tensor | None, until: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The balancing, disjoint and background losses of `attention` (h, w, l); the last is 0 without a background.

    `until`: as of `sharpened`.
    """
    maps = group_maps(attention, groups)
    outside = maps.sum() * 0 if background is None else background_loss(maps, background)
    return balancing_loss(sharpened(attention, groups, until)), disjoint_loss(maps), outside


@contextmanager
def noun_rows(model: StableDiffusion, groups: Sequence[NounGroup]) -> Iterator[list[TokenEmbedding]]:
    """Run the body with the nouns' token embeddings as trainable parameters; afterwards the model is as before.

    Yields one layer for each text encoder, whose `weight` (n, d) holds the n rows of the nouns' tokens, with their
    values at first. Inside the body every prompt that contains these tokens uses these rows.
    """
    tables = [encoder.get_input_embeddings() for encoder in model.text_encoders]
    layers = []
    try:
        for number, (encoder, table) in enumerate(zip(model.text_encoders, tables, strict=True)):
            ids = list(dict.fromkeys(index for group in groups for index in group.ids[number]))
            with torch.no_grad():
                rows = table(sent(torch.tensor([ids]), next(table.parameters()).device))[0]
            layer = TokenEmbedding(table, ids, rows, trainable=True)
            layers.append(layer.to(embedding_device(encoder), non_blocking=True))
            encoder.set_input_embeddings(layers[-1])
        yield layers
    finally:
        for encoder, table in zip(model.text_encoders, tables, strict=True):
            encoder.set_input_embeddings(table)


@dataclass
class DynamicPrompt:
    """The fitted noun embeddings of every sampling step, for one photo and prompt.

    rows: for each step and each text encoder, (n, d), fp32 on the CPU.
    first_losses, last_losses: for each step, the losses before its first and before its last update.
    drift: for each step, the largest ‖v − v₀‖ / ‖v₀‖.
    forward_passes, backward_passes: numbers of passes through the UNet.
    """

    prompt: str
    groups: tuple[NounGroup, ...]
    rows: list[tuple[Tensor, ...]] = field(default_factory=list)
    first_losses: list[Leakage] = field(default_factory=list)
    last_losses: list[Leakage] = field(default_factory=list)
    drift: list[float] = field(default_factory=list)
    forward_passes: int = 0
    backward_passes: int = 0

    @torch.no_grad()
    def conditionings(
        self, model: StableDiffusion, prompts: Sequence[str], size: tuple[int, int] | None = None, length: int = 0
    ) -> list[Conditioning]:
        """For each step, the conditioning of `prompts`, a row each, with the step's embeddings of the fitted nouns.

        It has at least `length` text positions.
        """
        with noun_rows(model, self.groups) as layers:
            return [model.padded(self._encoded(model, layers, rows, prompts, size), length) for rows in self.rows]

    @staticmethod
    def _encoded(
        model: StableDiffusion, layers: list[TokenEmbedding], rows: tuple[Tensor, ...], prompts: Sequence[str],
        size: tuple[int, int] | None,
    ) -> Conditioning:  # fmt: skip
        for layer, row in zip(layers, rows, strict=True):
            layer.weight.copy_(sent(row, layer.weight.device))
        return model.prompts(prompts, size)


class DynamicFit:
    """Fits the embeddings of nouns while `denoise` samples: it is given to `Edit` as `conditioning`.

    `result` is what was fitted; until it is read, embeddings stay on their device, so that a step waits for it only
    where its losses decide whether it is over.

    Args:
        background: boolean (h, w), where no noun belongs, or (k, h, w), where each noun does not belong; None leaves
            out the background loss.
        size: of the image in pixels, (H, W), for SDXL's conditioning.
        length: least number of text positions, for prompts that are sampled together with a longer one.
    """

    def __init__(
        self, model: StableDiffusion, prompt: str, groups: Sequence[NounGroup], background: Tensor | None,
        settings: DynamicSettings = DYNAMIC, size: tuple[int, int] | None = None, length: int = 0,
    ) -> None:  # fmt: skip
        self.model, self.prompt, self.groups, self.size = model, prompt, tuple(groups), size
        self.background = None if background is None else sent(background, model.device)
        self.settings = settings
        self.length = length
        self.until = tokenize_prompt(model, prompt).places[-1] if settings.words_only else None
        self.log = DynamicPrompt(prompt, self.groups)  # its rows and drift are kept below
        self.rows: list[tuple[Tensor, ...]] = []
        self.drift: list[tuple[Tensor, ...]] = []
        self.conditioning: Conditioning | None = None

    def __call__(self, step: Step, latents: Tensor) -> Conditioning:
        with noun_rows(self.model, self.groups) as layers:
            anchors = [layer.weight.detach().clone() for layer in layers]
            if self.rows:
                for layer, row in zip(layers, self.rows[-1], strict=True):
                    layer.weight.data.copy_(row)
            if not self.settings.idle:
                self._fit(layers, anchors, step, latents[:1])
            self.rows.append(tuple(layer.weight.detach().clone() for layer in layers))
            self.drift.append(tuple(_drift(*pair) for pair in zip(layers, anchors, strict=True)))
            with torch.no_grad():
                self.conditioning = self._encoded()
        return self.conditioning

    @property
    def result(self) -> DynamicPrompt:
        """What was fitted at the steps so far."""
        drift = [max(map(float, step)) for step in _on_host(self.drift)]
        return replace(self.log, rows=_on_host(self.rows), drift=drift)

    def latest(self, step: Step, latents: Tensor) -> Conditioning:
        """The conditioning of the current step, for what is fitted after it at the same step (null embeddings)."""
        assert self.conditioning is not None
        return self.conditioning

    def _encoded(self) -> Conditioning:
        return self.model.padded(self.model.prompts([self.prompt], self.size), self.length)

    @torch.enable_grad()
    def _fit(self, layers: list[TokenEmbedding], anchors: list[Tensor], step: Step, latents: Tensor) -> None:
        weights = [layer.weight for layer in layers]
        adam = torch.optim.AdamW(weights, lr=self.settings.rate)
        for number in range(self.settings.updates):
            conditioning = self._encoded()
            with gradient_checkpointing(self.model.unet, self.settings.gradient_checkpointing):
                attention = stage_attention(self.model, latents, step, conditioning)
            losses = leakage(attention, self.groups, self.background, self.until)
            self.log.forward_passes += 1
            now = Leakage(*torch.stack([loss.detach() for loss in losses]).tolist())  # one read of the device
            if number == 0:
                self.log.first_losses.append(now)
                self.log.last_losses.append(now)
            self.log.last_losses[-1] = now
            if now.within(step, self.settings.balancing_limit):
                return
            balancing, disjoint, outside = losses
            total = self.settings.balancing * balancing + self.settings.disjoint * disjoint
            total = total + self.settings.background * outside
            set_gradients(total, weights, self.model.dtype)
            self.log.backward_passes += 1
            adam.step()
            self._limit(layers, anchors)

    def _limit(self, layers: list[TokenEmbedding], anchors: list[Tensor]) -> None:
        """Move embeddings that are farther than `cap` from their words back to that distance."""
        if self.settings.cap is None:
            return
        for layer, anchor in zip(layers, anchors, strict=True):
            offset = layer.weight.data - anchor
            share = self.settings.cap * anchor.norm(dim=-1, keepdim=True) / offset.norm(dim=-1, keepdim=True)
            layer.weight.data.copy_(anchor + offset * share.clamp(max=1))


def fit_on_trajectory(fit: DynamicFit, latents: Tensor, down: Schedule) -> DynamicPrompt:
    """Fit at every step of schedule `down`, on inverted latents (t+1, 1, c, h, w) from clean to noisy.

    With direct inversion the source row is set to these latents at every step, so that neither guided sampling nor a
    null embedding is needed.
    """
    for step in ticked(down.numbered()):
        fit(step, sent(latents[step.count - step.index], fit.model.device))
    return fit.result


def _drift(layer: TokenEmbedding, anchor: Tensor) -> Tensor:
    return ((layer.weight.detach() - anchor).norm(dim=-1) / anchor.norm(dim=-1).clamp(min=1e-12)).max()


def _on_host(steps: list[tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
    """A tuple of tensors for each step, one for each text encoder, on the CPU: one read for each encoder."""
    return list(zip(*(torch.stack(encoder).cpu() for encoder in zip(*steps, strict=True)), strict=True))
