"""Cross-attention maps of the stage that stands for the papers' 16×16 maps (see `stage_side`).

`InversionMaps` collects them during an inversion; `stage_attention` computes them for one step, with gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from personalize.attention import AttentionHook, AttentionSite, MapStore, attention_sites, hooked, stage_side
from personalize.model import Conditioning, StableDiffusion
from personalize.moves import Step


class InversionMaps(AttentionHook):
    """Collects attention maps while a photo is inverted: cross-attention of every step, self-attention as a mean.

    Maps are kept on the CPU.  They are those of row 0 of the conditional pass, averaged over heads and layers.
    Cross-attention is read at the stage of `stage_side`; self-attention at twice its side if the UNet has any there,
    else at the same side.
    """

    def __init__(self, model: Any, size: tuple[int, int]) -> None:
        sites = attention_sites(model.unet, size)
        self.level = stage_level(model)
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
    def recorded(self) -> bool:
        """Whether an inversion has been recorded yet."""
        return bool(self._text)

    def cross_attention(self) -> Tensor:
        """The cross-attention map of every step, (t, h, w, l), in the order of the steps."""
        steps = [torch.stack(self._text[index]).mean(0) for index in sorted(self._text)]
        return torch.stack(steps).unflatten(1, (self.grid.height, self.grid.width))

    def self_attention(self) -> Tensor:
        """The self-attention map, averaged over steps: (h, w, h·w), from each position to all positions."""
        assert self._self is not None
        return (self._self / self._count).unflatten(0, (self.fine.height, self.fine.width))


def stage_level(model: Any) -> int:
    """How often the latents are halved before the stage of `stage_side`."""
    side = stage_side(model)
    return next(s.level for s in attention_sites(model.unet).values() if s.cross and s.side == side)


class StopForward(Exception):
    """Raised in a hook to leave the UNet's forward pass once all wanted maps are there."""


class StageMaps(MapStore):
    """Stores the cross-attention maps of one stage with their graph; raises `StopForward` after the last of them."""

    def __init__(self, model: StableDiffusion, size: tuple[int, int]) -> None:
        level = stage_level(model)
        sites = {n: s for n, s in attention_sites(model.unet, size).items() if s.cross and s.level == level}
        super().__init__(True, keep_graph=True)
        self.names = frozenset(sites)

    def wants(self, site: AttentionSite) -> bool:
        return site.name in self.names

    def probs(self, p: Tensor, site: AttentionSite) -> Tensor:
        super().probs(p, site)
        if len(self.maps) == len(self.names):
            raise StopForward
        return p


def stage_attention(model: StableDiffusion, latents: Tensor, step: Step, conditioning: Conditioning) -> Tensor:
    """The cross-attention map (h, w, l) of row 0 at one step, averaged over heads and layers; with gradients.

    The UNet runs only as far as the stage's last layer.
    """
    store = StageMaps(model, (int(latents.shape[-2]), int(latents.shape[-1])))
    try:
        with hooked(model.unet, [store], step=step):
            model.predict(latents[:1], step.timestep, conditioning)
    except StopForward:
        return store.mean()[0]
    raise AssertionError("the UNet's forward pass ended without calling all layers of the stage")
