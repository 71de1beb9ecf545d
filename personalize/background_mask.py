"""Where a photo's background is, by its own attention: positions that look at one another, and at no noun.

Self-attention rows are clustered; a cluster whose positions attend to no noun is background.

References: Wang et al., "Dynamic Prompt Learning", arXiv 2309.15664, supplement: text maps at 16×16 matched to clusters
of self-attention at 32×32 found objects better than features, queries, keys or values did.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from personalize.randomness import generator

RETRIES = (0, 3, 7)  # clusters added where every cluster is claimed by a noun
ROUNDS = 100  # of k-means; it stops as soon as nothing changes


def kmeans(rows: Tensor, clusters: int, seed: int = 0, restarts: int = 10) -> Tensor:
    """Labels (n,) of `rows` (n, d): Lloyd's algorithm from k-means++ starts, the best of `restarts` by inertia."""
    best, least = torch.zeros(len(rows), dtype=torch.long), float("inf")
    rows = rows.double()
    for restart in range(restarts):
        centres = _starts(rows, clusters, generator(seed, "kmeans", restart))
        labels = torch.full((len(rows),), -1)
        for _ in range(ROUNDS):
            found = torch.cdist(rows, centres).argmin(1)
            if torch.equal(found, labels):
                break
            labels = found
            centres = torch.stack([_mean(rows, labels == k, centres[k]) for k in range(len(centres))])
        inertia = float((rows - centres[labels]).square().sum())
        if inertia < least:
            best, least = labels, inertia
    return best


def background_mask(
    self_attention: Tensor, noun_maps: Tensor, *, clusters: int = 5, threshold: float = 0.2, seed: int = 0,
    dilated: bool = False,
) -> Tensor:  # fmt: skip
    """Boolean (h, w) of the noun maps' size: the clusters of self-attention that no noun claims.

        m̂_n = (m_n − min m_n) / max m_n        cluster c is background if  max_n mean_{cells of c} m̂_n ≤ threshold

    Args:
        self_attention: (H, W, H·W), rows are features.
        noun_maps: (k, h, w), raw.
        dilated: shrink by the published script's resize, which calls a cell background that is so in any part.
    """
    size = (int(self_attention.shape[0]), int(self_attention.shape[1]))
    labels = kmeans(self_attention.flatten(0, 1), clusters, seed)
    maps = noun_maps.double()
    low, high = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
    spread = interpolate(((maps - low) / high.clamp(min=1e-12))[None], size, mode="nearest")[0].flatten(1)
    claimed = torch.stack([_claim(spread, labels == k) > threshold for k in range(clusters)])
    fine = (~claimed[labels]).unflatten(0, size)
    height, width = noun_maps.shape[-2:]
    if dilated:
        return _as_published(fine, (height, width))
    return interpolate(fine[None, None].double(), (height, width), mode="area")[0, 0] >= 0.5


def find_background(
    self_attention: Tensor, noun_maps: Tensor, *, clusters: int = 5, threshold: float = 0.2, seed: int = 0,
    dilated: bool = False,
) -> tuple[Tensor | None, tuple[str, ...]]:  # fmt: skip
    """`background_mask`, with more clusters where nouns claim all; None and a note where there is no background."""
    mask = torch.zeros(noun_maps.shape[-2:], dtype=torch.bool)
    for more in RETRIES:
        mask = background_mask(
            self_attention, noun_maps, clusters=clusters + more, threshold=threshold, seed=seed, dilated=dilated
        )
        if mask.any():
            break
    if mask.all():
        return None, ("no noun stands out in the photo's attention, so the background is unknown: give a mask",)
    if not mask.any():
        return None, ("the nouns claim the whole photo, so nothing keeps them off the background: name fewer nouns",)
    return mask, ()


def _claim(spread: Tensor, cells: Tensor) -> Tensor:
    """The largest mean of any noun over `cells`; an empty cluster claims nothing and holds nothing."""
    return spread[:, cells].mean(1).max() if bool(cells.any()) else spread.new_zeros(())


def _starts(rows: Tensor, clusters: int, rng: torch.Generator) -> Tensor:
    """k-means++: each next centre drawn with a chance proportional to its squared distance from the nearest one."""
    first = int(torch.randint(len(rows), (1,), generator=rng))
    centres, nearest = [rows[first]], (rows - rows[first]).square().sum(1)
    for _ in range(clusters - 1):
        chances = nearest if float(nearest.sum()) > 0 else torch.ones_like(nearest)
        chosen = int(torch.multinomial(chances, 1, generator=rng))
        centres.append(rows[chosen])
        nearest = torch.minimum(nearest, (rows - rows[chosen]).square().sum(1))
    return torch.stack(centres)


def _mean(rows: Tensor, members: Tensor, old: Tensor) -> Tensor:
    return rows[members].mean(0) if bool(members.any()) else old


def _as_published(fine: Tensor, size: Sequence[int]) -> Tensor:
    side = 512
    picture = Image.fromarray(fine.numpy().astype(np.uint8) * 255).resize((side, side), Image.Resampling.NEAREST)
    small = picture.resize((size[1], size[0]), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(small) > 0)
