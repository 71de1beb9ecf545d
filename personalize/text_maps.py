"""Text attention of "the 16×16 stage": collected while a photo is inverted, or of one step alone, with gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from personalize.attention import AttentionHook, AttentionSite, MapStore, attention_sites, hooked, stage_side
from personalize.model import Conditioning, StableDiffusion
from personalize.moves import Step


class InversionMaps(AttentionHook):
    """Collects, while a photo is inverted, its text maps of every step and its mean self-attention, on the CPU.

    Row 0 of the conditional pass; means over heads and layers.  Text maps are those of "the 16×16 stage"
    (`stage_side`); self-attention is that of twice its side where the UNet has any, else of the same.
    """

    def __init__(self, model: Any, size: tuple[int, int]) -> None:
        sites = attention_sites(model.unet, size)
        self.level = text_level(model)
        finer = {site.level for site in sites.values() if not site.cross and site.level == self.level - 1}
        self.self_level = min(finer, default=self.level)
        self.grid = next(s for s in sites.values() if s.cross and s.level == self.level)
        self.fine = next(s for s in sites.values() if not s.cross and s.level == self.self_level)
        self._text: dict[int, list[Tensor]] = {}
        self._self: Tensor | None = None
        self._count = 0

    def wants(self, site: AttentionSite) -> bool:
        return site.level == (self.level if site.cross else self.self_level)

    def active(self, site: AttentionSite) -> bool:
        return site.branch in (None, "cond")

    def probs(self, p: Tensor, site: AttentionSite) -> Tensor:
        mean = p[0].detach().mean(0).cpu()
        if site.cross:
            self._text.setdefault(0 if site.step is None else site.step.index, []).append(mean)
        else:
            self._self = mean if self._self is None else self._self + mean
            self._count += 1
        return p

    @property
    def seen(self) -> bool:
        """Has it been part of an inversion yet?"""
        return bool(self._text)

    def text(self) -> Tensor:
        """(t, h, w, l): the map of every step, in the order in which the steps were made."""
        steps = [torch.stack(self._text[index]).mean(0) for index in sorted(self._text)]
        return torch.stack(steps).unflatten(1, (self.grid.height, self.grid.width))

    def self_attention(self) -> Tensor:
        """(h, w, h·w): how positions attend to one another, on the mean."""
        assert self._self is not None
        return (self._self / self._count).unflatten(0, (self.fine.height, self.fine.width))


def text_level(model: Any) -> int:
    """How often the latents are halved at "the 16×16 maps"."""
    side = stage_side(model)
    return next(s.level for s in attention_sites(model.unet).values() if s.cross and s.side == side)


class _Seen(Exception):
    """All maps that are wanted have been made: the rest of the UNet need not run."""


class StageMaps(MapStore):
    """Text maps of "the 16×16 stage", with gradients; the prediction is cut off behind the last of them."""

    def __init__(self, model: StableDiffusion, size: tuple[int, int]) -> None:
        level = text_level(model)
        sites = {n: s for n, s in attention_sites(model.unet, size).items() if s.cross and s.level == level}
        super().__init__(True, keep_graph=True)
        self.names = frozenset(sites)

    def wants(self, site: AttentionSite) -> bool:
        return site.name in self.names

    def probs(self, p: Tensor, site: AttentionSite) -> Tensor:
        super().probs(p, site)
        if len(self.maps) == len(self.names):
            raise _Seen
        return p


def stage_attention(model: StableDiffusion, latents: Tensor, step: Step, told: Conditioning) -> Tensor:
    """(h, w, l): text attention at one step, the mean over heads and the layers of "the 16×16 stage"."""
    store = StageMaps(model, (int(latents.shape[-2]), int(latents.shape[-1])))
    try:
        with hooked(model.unet, [store], step=step):
            model.predict(latents[:1], step.timestep, told)
    except _Seen:
        return store.mean()[0]
    raise AssertionError("the UNet ended before its own layer")
