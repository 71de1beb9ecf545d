"""What a drag reads from self-attention and carries over: hooks, and attention rows of single cells.

    A[p0, p] = softmax_p(q[p0] · k[p] / √d)

A row costs O(q), and the q × q map is never made.  What is kept is keyed by (site, timestep) and lies on the CPU.

References: AttentionDrag, arXiv 2506.13301; FastDrag, arXiv 2405.15769, for keys and values from inversion.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from personalize.attention import AttentionHook, AttentionSite
from personalize.drag_mask import Cell

Kept = dict[tuple[str, float], tuple[Tensor, ...]]


def finest(
    sites: Mapping[str, AttentionSite], places: Collection[str], levels: Collection[int] | None
) -> list[AttentionSite]:
    """Self-attention in `places`; `levels` counts those of each place that have any, 0 the finest (None: all)."""
    ours = [site for site in sites.values() if not site.cross and site.place in places]
    known = {place: sorted({site.level for site in ours if site.place == place}) for place in places}
    return [site for site in ours if levels is None or known[site.place].index(site.level) in levels]


class Projections(AttentionHook):
    """Keeps those of q, k, v (1, n, q, d) that are in `which`, of the sites `names`, at timesteps within `band`."""

    def __init__(self, names: Collection[str], which: str, band: tuple[float, float] = (0, float("inf"))) -> None:
        self.names, self.which, self.band = frozenset(names), which, band
        self.kept: Kept = {}

    def wants(self, site: AttentionSite) -> bool:
        return site.name in self.names

    def active(self, site: AttentionSite) -> bool:
        return self.band[0] <= site.step.timestep <= self.band[1]

    def qkv(self, q: Tensor, k: Tensor, v: Tensor, site: AttentionSite) -> tuple[Tensor, Tensor, Tensor]:
        parts = {"q": q, "k": k, "v": v}
        self.kept[site.name, site.step.timestep] = tuple(parts[name].detach().cpu() for name in self.which)
        return q, k, v


class Carried(AttentionHook):
    """Gives the sites k and v of an earlier run, at the same timestep: in place of their own, or beside them.

    Args:
        kept: k and v, as `Projections(…, "kv")` keeps them.
        mode: "replace" or "concat".
        start: number of the first step that does so.
    """

    def __init__(self, kept: Kept, mode: str = "replace", start: int = 0) -> None:
        self.kept, self.mode, self.start = kept, mode, start
        self.names = {name for name, _ in kept}

    def wants(self, site: AttentionSite) -> bool:
        return site.name in self.names

    def active(self, site: AttentionSite) -> bool:
        return site.step.index >= self.start

    def qkv(self, q: Tensor, k: Tensor, v: Tensor, site: AttentionSite) -> tuple[Tensor, Tensor, Tensor]:
        keys, values = (tensor.to(k) for tensor in self.kept[site.name, site.step.timestep])
        if self.mode == "concat":
            return q, torch.cat([k, keys], 2), torch.cat([v, values], 2)
        return q, keys, values


class Correlation:
    """Attention rows of single cells, from kept q and k, as maps of the latent grid.

    Mean over heads, sites and timesteps; every site counts alike: maps of coarse sites are spread over the finer grid.
    """

    def __init__(
        self, kept: Kept, sites: Sequence[AttentionSite], size: tuple[int, int], device: torch.device | str = "cpu"
    ) -> None:
        self.kept, self.size, self.device = kept, size, device
        self.sites = {site.name: site for site in sites}

    def rows(self, cells: Tensor) -> Tensor:
        """Rows of `cells` (m, 2), (m, h, w) on the CPU, each summing to about one."""
        sums: dict[tuple[int, int], Tensor] = {}
        for (name, _), (q, k) in self.kept.items():
            site = self.sites[name]
            asked = q[0, :, position(cells, site, self.size)].to(self.device, torch.float32)
            scores = asked @ k[0].to(self.device, torch.float32).transpose(-1, -2) * q.shape[-1] ** -0.5
            row = scores.softmax(-1).mean(0).unflatten(-1, (site.height, site.width))
            grid = (site.height, site.width)
            sums[grid] = sums.get(grid, 0) + row * (row[0].numel() / (self.size[0] * self.size[1]))
        return (_resized(sums, self.size) / len(self.kept)).cpu()

    def around(self, handle: Cell, window: int) -> Tensor:
        """Mean row (h, w) of the `window` × `window` cells around `handle` that lie in the frame."""
        return self.rows(neighbourhood(handle, window, self.size)).mean(0)


class Arrivals(AttentionHook):
    """Looks during sampling for the cells that resemble the handles as they were: cosines of q, never changing it.

        s_k[p] = mean over sites and timesteps of cos(mean of the source's q around handle k, q[p])

    Args:
        kept: q (and more) of the source, as `Projections(…, "qk")` keeps it.
    """

    def __init__(self, kept: Kept, sites: Sequence[AttentionSite], size: tuple[int, int], handles: Sequence[Cell],
                 window: int) -> None:  # fmt: skip
        self.kept, self.size, self.names = kept, size, {site.name for site in sites}
        self.windows = [neighbourhood(handle, window, size) for handle in handles]
        self.sums: dict[tuple[int, int], Tensor] = {}

    def wants(self, site: AttentionSite) -> bool:
        return site.name in self.names

    def active(self, site: AttentionSite) -> bool:
        return (site.name, site.step.timestep) in self.kept

    def qkv(self, q: Tensor, k: Tensor, v: Tensor, site: AttentionSite) -> tuple[Tensor, Tensor, Tensor]:
        source = self.kept[site.name, site.step.timestep][0].to(q.device, torch.float32)[0]
        means = [source[:, position(cells, site, self.size)].mean(1).flatten() for cells in self.windows]
        wanted, here = torch.stack(means), q[0].float().transpose(0, 1).flatten(1)
        cosine = torch.nn.functional.normalize(wanted, dim=-1) @ torch.nn.functional.normalize(here, dim=-1).T
        grid = (site.height, site.width)
        self.sums[grid] = self.sums.get(grid, 0) + cosine.unflatten(-1, grid)
        return q, k, v

    def cells(self, within: Tensor) -> list[Cell]:
        """The cell of `within` (h, w) that resembles each handle most."""
        maps = _resized(self.sums, self.size).cpu().masked_fill(~within, -torch.inf)
        flat = maps.flatten(1).argmax(1).tolist()
        return [divmod(number, self.size[1]) for number in flat]


def position(cells: Tensor, site: AttentionSite, size: tuple[int, int]) -> Tensor:
    """Number of the site's image position that holds the centre of each latent cell, (m,)."""
    scale = torch.tensor([site.height / size[0], site.width / size[1]], device=cells.device)
    rows, columns = ((cells + 0.5) * scale).long().T
    return rows * site.width + columns


def neighbourhood(handle: Cell, window: int, size: tuple[int, int]) -> Tensor:
    """The cells (m, 2) of the square of side `window` around `handle`, as far as it lies in the frame."""
    reach = window // 2
    rows, columns = (
        torch.arange(max(0, at - reach), min(side, at + reach + 1)) for at, side in zip(handle, size, strict=True)
    )
    return torch.cartesian_prod(rows, columns)


def _resized(sums: Mapping[tuple[int, int], Tensor], size: tuple[int, int]) -> Tensor:
    maps = [interpolate(grid[None], size, mode="bilinear", align_corners=False)[0] for grid in sums.values()]
    return torch.stack(maps).sum(0)
