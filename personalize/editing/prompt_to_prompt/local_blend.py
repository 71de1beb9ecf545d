"""Local blend: an edit may change a photo only where given words attend (Hertz et al., arXiv 2208.01626, §3.3).

It needs the attention maps of the batch alone, so that it goes with every way of controlling attention.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate, max_pool2d

from personalize.models.attention_maps import MapSum, stage_layers
from personalize.models.prompts import Tokens
from personalize.models.stable_diffusion import StableDiffusion
from personalize.models.transfer import sent
from personalize.models.words import words_of
from personalize.sampling.denoise import LatentEdit
from personalize.sampling.schedule import Step


class LocalBlend(LatentEdit):
    """Local blend: outside the regions of given words, rows 1 … become row 0:  z ← z_source + m (z − z_source).

    m is the union of the regions of all source and target words. A word's region is where its mean map so far, 3×3
    max-pooled and resized to the latents, is at least `threshold` of its own maximum, which is small for a word that
    looks at a wide background.

    Args:
        maps: a hook of the same edit; it must come after the hooks that change maps.
        words: (b, s, l), for each of s words 1 at its tokens, else 0; one row for the source and one for each target. A
            word that a row does not have has no region there.
        threshold: share of the maximum, in [0, 1].
        begin: number of the first step that is blended.
    """

    def __init__(self, maps: MapSum, words: Tensor, threshold: float, begin: int) -> None:
        self.maps, self.words, self.threshold, self.begin = maps, words, threshold, begin

    def latents(self, z: Tensor, step: Step) -> Tensor:
        if step.index < self.begin:
            return z
        return torch.where(self.mask((z.shape[-2], z.shape[-1])), z, z[:1])

    def mask(self, size: tuple[int, int]) -> Tensor:
        """m: where rows keep their own latents, boolean (b, 1, h, w), for latents of `size` (h, w)."""
        mean = self.maps.mean()
        if self.words.device != mean.device:
            self.words = sent(self.words, mean.device)
        regions = [self._region(mean, one, size) for one in self.words.to(mean).unbind(1)]
        region = torch.stack(regions).any(0)
        return region[:1] | region

    def _region(self, mean: Tensor, word: Tensor, size: tuple[int, int]) -> Tensor:
        """The region (b, 1, h, w) of one word, whose tokens are 1 in `word` (b, l), by mean maps (b, h, w, l)."""
        heat = (mean * word[:, None, None]).sum(-1)[:, None]
        heat = interpolate(max_pool2d(heat, 3, 1, 1), size, mode="nearest")
        most = heat.amax((-2, -1), keepdim=True)
        return (heat >= self.threshold * most) & (most > 0)


def word_blend(
    model: StableDiffusion, source: Tokens | None, targets: Sequence[Tokens], words: Sequence[tuple[str, str]],
    threshold: float, begin: int,
) -> tuple[MapSum, LocalBlend]:  # fmt: skip
    """The hook that collects the maps, to be put after those that change them, and the local blend that reads it.

    Args:
        source: the source prompt, or None if the source row has none; then the targets' words alone count.
        words: (word of the source, word of the targets); the same word twice counts in those prompts that have it.

    Raises:
        UserError: a word is not in its prompt, or in none if it is given twice.
    """
    prompts = [*([] if source is None else [source]), *targets]
    for word in (old for old, new in words if old == new):
        if not any(one.has(word) for one in prompts):
            prompts[0].find(word)
    maps, length = MapSum(stage_layers(model)), max(one.length for one in prompts)
    first = torch.zeros(len(words), length) if source is None else _marked(source, words, 0, length)
    marked = [first, *(_marked(one, words, 1, length) for one in targets)]
    return maps, LocalBlend(maps, torch.stack(marked), threshold, begin)


def per_word(tokens: Tokens, values: Mapping[str, float], default: float, length: int) -> Tensor:
    """A value for each token, (l,): `values` at every occurrence of their words, `default` elsewhere.

    Of a phrase and a word in it, such as "black cat" and "cat", the word has its own value, in whatever order they are.
    """
    row = torch.full((length,), float(default))
    for word, value in sorted(values.items(), key=lambda pair: -len(words_of(pair[0]))):
        for span in tokens.find(word):
            row[list(span)] = float(value)
    return row


def _marked(tokens: Tokens, words: Sequence[tuple[str, str]], side: int, length: int) -> Tensor:
    """For each pair of `words` 1 at the tokens of every occurrence of the one of this `side`, else 0: (s, l).

    A word that is the same on both sides may be missing in this prompt.
    """
    here = [pair[side] for pair in words if pair[0] != pair[1] or tokens.has(pair[0])]
    rows = [per_word(tokens, {word: 1.0} if word in here else {}, 0.0, length) for word in (p[side] for p in words)]
    return torch.stack(rows)
