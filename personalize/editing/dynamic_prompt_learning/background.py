"""Estimate the background of a photo from its attention maps.

The rows of the self-attention map are clustered with k-means. A cluster to which no noun attends is background.

References: Wang et al., "Dynamic Prompt Learning", arXiv 2309.15664, supplement: matching cross-attention maps at
16×16 with clusters of self-attention at 32×32 finds objects better than clusters of features, queries, keys or values.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from personalize.randomness import generator

MORE_CLUSTERS = (0, 3, 7)  # clusters added, one after the other, while every cluster belongs to a noun
MAX_CELLS = 48 * 48  # positions that are clustered: with more, their maps are averaged over blocks of positions first
MAX_ITERATIONS = 100  # of k-means, which stops as soon as no label changes


def kmeans(rows: Tensor, clusters: int, seed: int = 0, restarts: int = 10) -> Tensor:
    """Cluster labels (n,) of `rows` (n, d): Lloyd's algorithm from k-means++ centres, the best of several restarts."""
    best, least = torch.zeros(len(rows), dtype=torch.long), float("inf")
    rows = rows.double()
    for restart in range(restarts):
        centres = _starts(rows, clusters, generator(seed, "kmeans", restart))
        labels = torch.full((len(rows),), -1)
        for _ in range(MAX_ITERATIONS):
            nearest = torch.cdist(rows, centres).argmin(1)
            if torch.equal(nearest, labels):
                break
            labels = nearest
            centres = torch.stack([_mean(rows, labels == k, centres[k]) for k in range(len(centres))])
        inertia = float((rows - centres[labels]).square().sum())
        if inertia < least:
            best, least = labels, inertia
    return best


def background_mask(
    self_attention: Tensor, noun_maps: Tensor, *, clusters: int = 5, threshold: float = 0.2, seed: int = 0,
    dilated: bool = False,
) -> Tensor:  # fmt: skip
    """The background, boolean (h, w): the clusters of self-attention to which no noun attends.

        m̂_n = (m_n − min m_n) / max m_n        cluster c is background if  max_n mean_{cells of c} m̂_n ≤ threshold

    Args:
        self_attention: (H, W, H·W); the row of each position is its feature vector.
        noun_maps: attention maps (k, h, w) of k nouns, not normalised.
        dilated: resize like the published script, for which a cell is background if any part of it is; otherwise at
            least half of it must be.
    """
    self_attention = _pooled(self_attention)
    size = (int(self_attention.shape[0]), int(self_attention.shape[1]))
    labels = kmeans(self_attention.flatten(0, 1), clusters, seed)
    maps = noun_maps.double()
    low, high = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
    spread = interpolate(((maps - low) / high.clamp(min=1e-12))[None], size, mode="nearest")[0].flatten(1)
    attended = torch.stack([_attention_to(spread, labels == k) > threshold for k in range(clusters)])
    fine = (~attended[labels]).unflatten(0, size)
    height, width = noun_maps.shape[-2:]
    if dilated:
        return _as_published(fine, (height, width))
    return interpolate(fine[None, None].double(), (height, width), mode="area")[0, 0] >= 0.5


def find_background(
    self_attention: Tensor, noun_maps: Tensor, *, clusters: int = 5, threshold: float = 0.2, seed: int = 0,
    dilated: bool = False,
) -> tuple[Tensor | None, tuple[str, ...]]:  # fmt: skip
    """`background_mask`, with more clusters while there is no background; None and a note if none is found."""
    mask = torch.zeros(noun_maps.shape[-2:], dtype=torch.bool)
    for more in MORE_CLUSTERS:
        mask = background_mask(
            self_attention, noun_maps, clusters=clusters + more, threshold=threshold, seed=seed, dilated=dilated
        )
        if mask.any():
            break
    if mask.all():
        return None, ("no noun stands out in the photo's attention, so the background is unknown: give a mask",)
    if not mask.any():
        return None, ("the nouns attend to the whole photo, so that no background is known: name fewer nouns",)
    return mask, ()


def _pooled(self_attention: Tensor) -> Tensor:
    """`self_attention` (H, W, H·W) with rows and columns averaged over blocks until H·W is at most `MAX_CELLS`.

    k-means works on a matrix of H·W by H·W, which at 64×64 positions would be 134 MB in fp64 and take minutes.
    """
    height, width = self_attention.shape[:2]
    block = 1
    while -(-height // block) * -(-width // block) > MAX_CELLS:
        block += 1
    if block == 1:
        return self_attention
    size = (-(-height // block), -(-width // block))
    columns = interpolate(self_attention.reshape(1, height * width, height, width), size, mode="area")[0]
    rows = interpolate(columns.flatten(1).T.reshape(1, -1, height, width), size, mode="area")[0]
    return rows.flatten(1).T.reshape(*size, -1)


def _attention_to(spread: Tensor, cells: Tensor) -> Tensor:
    """The largest mean of any noun's map over the cells of a cluster; 0 for an empty cluster."""
    return spread[:, cells].mean(1).max() if bool(cells.any()) else spread.new_zeros(())


def _starts(rows: Tensor, clusters: int, rng: torch.Generator) -> Tensor:
    """Initial centres by k-means++.

    After the first, each is drawn with a probability proportional to its squared distance from the nearest one so far.
    """
    first = int(torch.randint(len(rows), (1,), generator=rng))
    centres, distances = [rows[first]], (rows - rows[first]).square().sum(1)
    for _ in range(clusters - 1):
        weights = distances if float(distances.sum()) > 0 else torch.ones_like(distances)
        chosen = int(torch.multinomial(weights, 1, generator=rng))
        centres.append(rows[chosen])
        distances = torch.minimum(distances, (rows - rows[chosen]).square().sum(1))
    return torch.stack(centres)


def _mean(rows: Tensor, members: Tensor, old: Tensor) -> Tensor:
    """The centre of a cluster; the old one if the cluster is empty."""
    return rows[members].mean(0) if bool(members.any()) else old


def _as_published(fine: Tensor, size: Sequence[int]) -> Tensor:
    """Resize a mask like the published script: to 512 px, then to `size` (h, w); True where anything is left."""
    side = 512
    picture = Image.fromarray(fine.numpy().astype(np.uint8) * 255).resize((side, side), Image.Resampling.NEAREST)
    small = picture.resize((size[1], size[0]), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(small) > 0)
