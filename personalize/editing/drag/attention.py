"""Self-attention in a drag: recording q, k and v during inversion, and using them to warp and to sample.

`QKVRecorder` records them, `AttentionRows` computes the attention of single image positions from q and k,

    A[p0, p] = softmax_p(q[p0] · k[p] / √d),

`KeyValueInjection` gives the recorded k and v to sampling, and `PointTracker` finds where the handles went.  One row of
A costs O(q) memory; the whole q × q map is never computed.  Recordings are keyed by (site name, timestep); they stay
on the device where it has room for them, so that no step waits for a copy, and are on the CPU otherwise.

References: AttentionDrag, arXiv 2506.13301; FastDrag, arXiv 2405.15769, for keys and values from inversion.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from personalize.editing.drag.mask import Cell
from personalize.models.attention import AttentionHook, AttentionSite
from personalize.models.memory import free_bytes
from personalize.models.transfer import sent

SHARE = 4  # a recorder keeps at most this part of the device's free memory, as 1/SHARE: there are two in a drag
Recording = dict[tuple[str, float], tuple[Tensor, ...]]


def self_attention_sites(
    sites: Mapping[str, AttentionSite], places: Collection[str], levels: Collection[int] | None
) -> list[AttentionSite]:
    """The self-attention sites in `places` ("down", "mid", "up") at the resolutions `levels`.

    `levels` numbers the resolutions of a place that have self-attention, 0 being the finest; None selects all.
    """
    selected = [site for site in sites.values() if not site.cross and site.place in places]
    known = {place: sorted({site.level for site in selected if site.place == place}) for place in places}
    return [site for site in selected if levels is None or known[site.place].index(site.level) in levels]


class QKVRecorder(AttentionHook):
    """Records the projections q, k, v (1, n, q, d) of attention sites without changing them.

    Args:
        names: the sites.
        which: the projections, in this order: "qk", "kv", ….
        band: first and last timestep at which they are recorded.
        shared: a recording of q and k by an earlier hook; where it has a site's k, that tensor is kept, and no second
            copy, for these recordings are what a drag of latents needs most memory for.
    """

    def __init__(
        self, names: Collection[str], which: str, band: tuple[float, float] = (0, float("inf")),
        shared: Recording | None = None,
    ) -> None:  # fmt: skip
        self.names, self.which, self.band = frozenset(names), which, band
        self.shared = {} if shared is None else shared
        self.kept: Recording = {}
        self.room: int | None = None  # bytes that may still be kept on the device

    def wants(self, site: AttentionSite) -> bool:
        return site.name in self.names

    def active(self, site: AttentionSite) -> bool:
        return self.band[0] <= site.step.timestep <= self.band[1]

    def qkv(self, q: Tensor, k: Tensor, v: Tensor, site: AttentionSite) -> tuple[Tensor, Tensor, Tensor]:
        parts, place = {"q": q, "k": k, "v": v}, (site.name, site.step.timestep)
        there = {"k": self.shared[place][1]} if place in self.shared else {}
        self.kept[place] = tuple(there[name] if name in there else self._copied(parts[name]) for name in self.which)
        return q, k, v

    def _copied(self, part: Tensor) -> Tensor:
        if self.room is None:
            free = free_bytes(part.device)
            self.room = sys.maxsize if free is None else free // SHARE  # MPS: the device's memory is the CPU's
        if part.device.type == "cpu" or part.nbytes > self.room:
            return part.detach().cpu()
        self.room -= part.nbytes
        return part.detach().clone()


class KeyValueInjection(AttentionHook):
    """Lets attention read the keys and values that were recorded at the same site and timestep.

    Args:
        kept: k and v, as `QKVRecorder(…, "kv")` records them.
        mode: "replace" puts them in the place of the site's own k and v, "concat" appends them.
        start: index of the first sampling step that uses them.
    """

    def __init__(self, kept: Recording, mode: str = "replace", start: int = 0) -> None:
        self.kept, self.mode, self.start = kept, mode, start
        self.names = {name for name, _ in kept}

    def wants(self, site: AttentionSite) -> bool:
        return site.name in self.names

    def active(self, site: AttentionSite) -> bool:
        return site.step.index >= self.start

    def qkv(self, q: Tensor, k: Tensor, v: Tensor, site: AttentionSite) -> tuple[Tensor, Tensor, Tensor]:
        keys, values = (sent(tensor, k.device).to(k) for tensor in self.kept[site.name, site.step.timestep])
        if self.mode == "concat":
            return q, torch.cat([k, keys], 2), torch.cat([v, values], 2)
        return q, keys, values


class AttentionRows:
    """Attention rows of single latent cells, computed from recorded q and k, as maps on the latent grid.

    A row is the mean over heads, sites and timesteps, in which every site has the same weight: the map of a coarse site
    is interpolated to the latent grid and scaled to keep its sum.
    """

    def __init__(
        self, kept: Recording, sites: Sequence[AttentionSite], size: tuple[int, int], device: torch.device | str = "cpu"
    ) -> None:
        self.kept, self.size, self.device = kept, size, device
        self.sites = {site.name: site for site in sites}

    def rows(self, cells: Tensor) -> Tensor:
        """The attention (m, h, w) of `cells` (m, 2), on the CPU; each map sums to about one."""
        return self._rows(cells, mean=False)

    def mean_row(self, cells: Tensor) -> Tensor:
        """The mean attention (h, w) of `cells` (m, 2)."""
        return self._rows(cells, mean=True)[0]

    def mass(self, cells: Tensor, mask: Tensor) -> Tensor:
        """The attention (m,) that `cells` (m, 2) give to the cells of `mask` (h, w), summed at each site's own size."""
        total = torch.zeros(len(cells), device=self.device)
        for (name, _), (q, k) in self.kept.items():
            site = self.sites[name]
            share = interpolate(mask[None, None].float(), (site.height, site.width), mode="area").flatten()
            total += (self._weights(q, k, site, cells) @ sent(share, self.device)).mean(0)
        return (total / len(self.kept)).cpu()

    def around(self, handle: Cell, window: int) -> Tensor:
        """Mean attention (h, w) of the `window` × `window` cells around `handle` that lie on the grid."""
        return self.mean_row(neighbourhood(handle, window, self.size))

    def _rows(self, cells: Tensor, *, mean: bool) -> Tensor:
        """The rows of `cells`, or their mean alone (1, h, w), which saves the interpolation of each."""
        sums: dict[tuple[int, int], Tensor] = {}
        for (name, _), (q, k) in self.kept.items():
            site = self.sites[name]
            weights = self._weights(q, k, site, cells)
            row = (weights.mean((0, 1))[None] if mean else weights.mean(0)).unflatten(-1, (site.height, site.width))
            grid = (site.height, site.width)
            sums[grid] = sums.get(grid, 0) + row * (row[0].numel() / (self.size[0] * self.size[1]))
        return (_resized(sums, self.size) / len(self.kept)).cpu()

    def _weights(self, q: Tensor, k: Tensor, site: AttentionSite, cells: Tensor) -> Tensor:
        """The softmax (n, m, q) of the rows of `cells` at one site."""
        queries = sent(q[0, :, sent(site_positions(cells, site, self.size), q.device)], self.device).float()
        keys = sent(k[0], self.device).float()
        return ((queries * q.shape[-1] ** -0.5) @ keys.transpose(-1, -2)).softmax(-1)


class PointTracker(AttentionHook):
    """Finds in the sampled picture the cells that resemble each handle of the source, by the similarity of queries.

        s_k[p] = mean over sites and timesteps of cos(mean of the source's q around handle k, q[p])

    It reads q during sampling and changes nothing.

    Args:
        kept: q of the source first, as `QKVRecorder(…, "qk")` records it.
        window: side in cells of the square around a handle over which the source's q is averaged.
    """

    def __init__(self, kept: Recording, sites: Sequence[AttentionSite], size: tuple[int, int], handles: Sequence[Cell],
                 window: int) -> None:  # fmt: skip
        self.kept, self.size, self.names = kept, size, {site.name for site in sites}
        self.windows = [neighbourhood(handle, window, size) for handle in handles]
        self.sums: dict[tuple[int, int], Tensor] = {}

    def wants(self, site: AttentionSite) -> bool:
        return site.name in self.names

    def active(self, site: AttentionSite) -> bool:
        return (site.name, site.step.timestep) in self.kept

    def qkv(self, q: Tensor, k: Tensor, v: Tensor, site: AttentionSite) -> tuple[Tensor, Tensor, Tensor]:
        source = self.kept[site.name, site.step.timestep][0][0]
        places = [sent(site_positions(cells, site, self.size), source.device) for cells in self.windows]
        means = torch.stack([source[:, place].float().mean(1).flatten() for place in places])
        handles, queries = sent(means, q.device), q[0].float().transpose(0, 1).flatten(1)
        cosine = torch.nn.functional.normalize(handles, dim=-1) @ torch.nn.functional.normalize(queries, dim=-1).T
        grid = (site.height, site.width)
        self.sums[grid] = self.sums.get(grid, 0) + cosine.unflatten(-1, grid)
        return q, k, v

    def cells(self, within: Tensor) -> list[Cell]:
        """For each handle, the most similar cell inside the mask `within` (h, w)."""
        maps = _resized(self.sums, self.size).cpu().masked_fill(~within, -torch.inf)
        flat = maps.flatten(1).argmax(1).tolist()
        return [divmod(number, self.size[1]) for number in flat]


def site_positions(cells: Tensor, site: AttentionSite, size: tuple[int, int]) -> Tensor:
    """Index (m,) of the site's image position at the centre of each of `cells` (m, 2) of a grid of `size`."""
    scale = torch.tensor([site.height / size[0], site.width / size[1]], device=cells.device)
    rows, columns = ((cells + 0.5) * scale).long().T
    return rows * site.width + columns


def neighbourhood(handle: Cell, window: int, size: tuple[int, int]) -> Tensor:
    """The cells (m, 2) on the grid within the square of `window` cells' side around `handle`."""
    reach = window // 2
    rows, columns = (
        torch.arange(max(0, at - reach), min(side, at + reach + 1)) for at, side in zip(handle, size, strict=True)
    )
    return torch.cartesian_prod(rows, columns)


def _resized(sums: Mapping[tuple[int, int], Tensor], size: tuple[int, int]) -> Tensor:
    """The sum of maps of several resolutions, each interpolated to `size`, (k, h, w)."""
    maps = [interpolate(grid[None], size, mode="bilinear", align_corners=False)[0] for grid in sums.values()]
    return torch.stack(maps).sum(0)
