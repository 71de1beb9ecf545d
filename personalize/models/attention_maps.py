"""Record cross-attention maps at the resolution that stands for the papers' 16×16 maps (see `stage_side`).

`InversionMaps` collects them during an inversion; `stage_attention` computes them for one step, with gradients.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from personalize.errors import UserError
from personalize.models.attention import AttentionHook, AttentionSite, attention_sites

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

SELF_SIDE = 48  # positions a side, at the base's own size, of the largest self-attention maps that are collected


class InversionMaps(AttentionHook):
    """Collects attention maps over the steps of a schedule: cross-attention of every step, self-attention as a mean.

    They are those of row 0 of the conditional pass, averaged over heads and layers where they are made: on the device
    there is one sum for each step, (q, l), and one of self-attention, (q, q).  Cross-attention is read at the stage of
    `stage_side`; self-attention at twice its side if the UNet has any there of at most `SELF_SIDE` positions a side at
    the base's own size (SD 1: 32, SD 2: 48), else at the same side (SDXL: 32).
    """

    def __init__(self, model: Any, size: tuple[int, int]) -> None:
        sites = attention_sites(model.unet, size)
        self.level = stage_level(model)
        finer = {
            site.level for site in attention_sites(model.unet).values()
            if not site.cross and site.level == self.level - 1 and site.side <= SELF_SIDE
        }  # fmt: skip
        self.self_level = min(finer, default=self.level)
        self.grid = next(s for s in sites.values() if s.cross and s.level == self.level)
        self.fine = next(s for s in sites.values() if not s.cross and s.level == self.self_level)
        self._text: dict[int, Tensor] = {}
        self._self: Tensor | None = None
        self._counts: Counter[int | str] = Counter()  # summed maps: of each step's text, and "self"

    def wants(self, site: AttentionSite) -> bool:
        return site.level == (self.level if site.cross else self.self_level)

    def active(self, site: AttentionSite) -> bool:
        return site.branch in (None, "cond")

    def probs(self, p: Tensor, site: AttentionSite) -> Tensor:
        mean = p[0].detach().mean(0)
        if site.cross:
            index = 0 if site.step is None else site.step.index
            self._text[index] = self._text[index] + mean if index in self._text else mean
            self._counts[index] += 1
        else:
            self._self = mean if self._self is None else self._self + mean
            self._counts["self"] += 1
        return p

    def cross_attention(self) -> Tensor:
        """The cross-attention map of every step, (t, h, w, l), in the order of the steps, on the CPU."""
        steps = [self._text[index] / self._counts[index] for index in sorted(self._text)]
        return torch.stack(steps).cpu().unflatten(1, (self.grid.height, self.grid.width))

    def self_attention(self) -> Tensor:
        """The self-attention map, averaged over steps: (h, w, h·w), from each position to all, on the CPU."""
        assert self._self is not None
        return (self._self.cpu() / self._counts["self"]).unflatten(0, (self.fine.height, self.fine.width))


def stage_layers(model: Any) -> list[str]:
    """Names of the cross-attention layers at the stage of `stage_side`, whatever the size of the photo."""
    level = stage_level(model)
    return [name for name, site in attention_sites(model.unet).items() if site.cross and site.level == level]


def stage_level(model: Any) -> int:
    """How often the latents are halved before the stage of `stage_side`."""
    side = stage_side(model)
    return next(s.level for s in attention_sites(model.unet).values() if s.cross and s.side == side)


class StopForward(Exception):
    """Raised in a hook to leave the UNet's forward pass once all wanted maps are there."""


class MapStore(AttentionHook):
    """Stores the latest attention map of each wanted layer in `maps`, by layer name.

    Args:
        cross: cross-attention (True), self-attention (False) or both (None).
        side: only maps of this side; see `stage_side`.
        place: only "down", "mid" or "up".
        branch: which pass of the denoising loop to store; outside the loop all maps are stored.
        keep_graph: keep the graph of the maps, for losses.
    """

    def __init__(
        self,
        cross: bool | None = True,
        *,
        side: int | None = None,
        place: str | None = None,
        branch: str = "cond",
        keep_graph: bool = False,
    ) -> None:
        self.cross, self.side, self.place, self.branch, self.keep_graph = cross, side, place, branch, keep_graph
        self.maps: dict[str, Tensor] = {}
        self.sites: dict[str, AttentionSite] = {}

    def wants(self, site: AttentionSite) -> bool:
        pairs = ((self.cross, site.cross), (self.side, site.side), (self.place, site.place))
        return all(wanted is None or wanted == actual for wanted, actual in pairs)

    def active(self, site: AttentionSite) -> bool:
        return site.branch in (None, self.branch)

    def probs(self, p: Tensor, site: AttentionSite) -> Tensor:
        self.maps[site.name] = p if self.keep_graph else p.detach()
        self.sites[site.name] = site
        return p

    def grid(self, name: str) -> Tensor:
        """The map of one layer with its image positions as a grid: (b, n, h, w, l)."""
        site = self.sites[name]
        return self.maps[name].unflatten(2, (site.height, site.width))

    def mean(self) -> Tensor:
        """Mean map over heads and layers, (b, h, w, l); ValueError if there are no maps, or maps of several sizes."""
        sizes = {(site.height, site.width) for site in self.sites.values()}
        if len(sizes) != 1:
            raise ValueError(f"a mean needs maps of one size, the store has {sorted(sizes)}: give MapStore a side")
        return torch.stack([self.grid(name).mean(1) for name in self.maps]).mean(0)


def stage_side(model: Any, target: int = 16) -> int:
    """Side of the maps that stand for the papers' 16×16 maps: the one nearest to `target`.

    Only stages with cross-attention in both the down and the up blocks count.  It is 16 on SD 1.x, 24 on SD 2 at 768 px
    and 32 on SDXL.
    """
    sides = {
        place: {site.side for site in attention_sites(model.unet).values() if site.cross and site.place == place}
        for place in ("down", "up")
    }
    return min(sides["down"] & sides["up"], key=lambda side: (abs(side - target), side))


class MapSum(AttentionHook):
    """Collects cross-attention maps of the conditional pass; `mean` (b, h, w, l) averages them over the steps so far.

    The mean is also over heads and over `layers`, names of layers of one resolution.
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
        """The mean maps (b, h, w, l); ValueError before the first prediction."""
        if self.sum is None:
            raise ValueError("no attention map was collected yet: add the hook to the edit, and read it after sampling")
        return self.sum / self.count


SIDE = 16  # cells along the shorter side of a map: larger maps are pooled, in their own shape


class CalibrationMaps(MapStore):
    """Records the cross-attention maps of the layers `names`, with gradient; see `calibration_layers`."""

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__(cross=True, keep_graph=True)
        self.names = frozenset(names)

    def wants(self, site: AttentionSite) -> bool:
        return site.name in self.names

    def of_tokens(self, tokens: Tensor) -> Tensor:
        """Maps of sets of tokens, averaged over layers and heads: (b, s, h, w) in fp32, of at most 16 cells.

        16 is the limit of the shorter side; the longer one keeps its proportion to it.

        tokens: (b, s, l), 1 for the text positions of each set and 0 elsewhere.  The maps of a set's positions (the
            vectors of a token, the pieces of a class phrase) add up.
        """
        maps = self.mean().float()  # (b, h, w, l)
        summed = torch.stack([(maps * chosen[:, None, None]).sum(-1) for chosen in tokens.to(maps).unbind(1)], 1)
        height, width = summed.shape[-2:]
        scale = min(1, SIDE / min(height, width))
        return adaptive_avg_pool2d(summed, (round(height * scale), round(width * scale)))


def calibration_layers(unet: UNet2DConditionModel, size: tuple[int, int]) -> list[str]:
    """The cross-attention layers whose maps are calibrated, for latents of `size` (h, w): five on SD 1.x.

    They belong to the stage whose maps have the area nearest to 16×16, among the stages that have cross-attention both
    in the down and in the up blocks; the middle block does not count.  Of several transformer blocks in a row (SDXL:
    ten), only the middle one is calibrated.

    Raises:
        UserError: this UNet has no such stage, or its maps have fewer than 4 cells a side.
    """
    sites = {name: site for name, site in attention_sites(unet, size).items() if site.cross and site.place != "mid"}
    levels = {place: {s.level for s in sites.values() if s.place == place} for place in ("down", "up")}
    common = levels["down"] & levels["up"]
    if not common:
        raise UserError("this UNet has no stage with text attention on both paths, so no maps to read")
    side = {site.level: site.side for site in sites.values()}
    level = min(common, key=lambda level: (abs(side[level] - SIDE), side[level]))
    shortest = min(min(site.height, site.width) for site in sites.values() if site.level == level)
    if shortest < 4:
        raise UserError(
            f"the attention maps nearest 16×16 have {shortest} cells a side, at least 4 are needed: "
            "raise the resolution, or do without (calibration_weight 0)"
        )
    rows: dict[str, list[str]] = {}
    for name, site in sites.items():
        if site.level == level:
            rows.setdefault(name.rpartition(".transformer_blocks.")[0], []).append(name)
    return [names[len(names) // 2] for names in rows.values()]
