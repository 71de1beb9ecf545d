"""How well attention maps locate objects: area under the ROC curve (AUC) against the scenes' true masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from personalize.embedded.scenes import Scene, render
from personalize.models.attention import AttentionHook, AttentionSite, hooked
from personalize.models.stable_diffusion import StableDiffusion
from personalize.randomness import generator
from tests.bench.judge.judge import as_pixels

TIMESTEPS = (100, 300, 500, 700, 900)
CELL_GRID = 16  # the cell "inside the object" is one of a 16×16 grid


def auc(values: np.ndarray, inside: np.ndarray) -> float | None:
    """The probability that a value inside exceeds one outside, ties counting half; None if either set is empty."""
    values, inside = values.ravel(), inside.ravel()
    positive, negative = int(inside.sum()), int((~inside).sum())
    if not positive or not negative:
        return None
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]  # mean rank of equal values, from 1
    return float((ranks[inside].sum() - positive * (positive + 1) / 2) / (positive * negative))


def coverage(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """Share of each cell of a `height` × `width` grid that boolean `mask` (H, W) covers."""
    pixels = torch.from_numpy(mask.astype(np.float32))[None, None]
    return torch.nn.functional.adaptive_avg_pool2d(pixels, (height, width))[0, 0].numpy()


def token_positions(model: StableDiffusion, prompt: str, noun: str) -> list[int]:
    """Positions of the first occurrence of `noun` among the tokens of `prompt`; the start token is position 0.

    Raises:
        ValueError: the prompt does not contain the noun.
    """
    pieces, wanted = model.tokens(prompt), model.tokens(noun.replace("_", " "))
    for start in range(len(pieces) - len(wanted) + 1):
        if pieces[start : start + len(wanted)] == wanted:
            return [1 + start + offset for offset in range(len(wanted))]
    raise ValueError(f"no {noun!r} in the prompt {prompt!r}")


class NounMaps(AttentionHook):
    """Records the map of each row's own tokens in every cross-attention layer: mean over heads and tokens, (b, q)."""

    def __init__(self, tokens: Sequence[Sequence[int]]) -> None:
        self.tokens, self.rows, self.sites = tokens, {}, {}

    def wants(self, site: AttentionSite) -> bool:
        return site.cross

    def probs(self, p: Tensor, site: AttentionSite) -> Tensor:
        means = [p[row, :, :, list(tokens)].mean((0, 2)) for row, tokens in enumerate(self.tokens)]
        self.rows[site.name], self.sites[site.name] = torch.stack(means), site
        return p


class CellRows(AttentionHook):
    """Records what the cell at each row's point attends to in every self-attention layer: mean over heads, (b, q)."""

    def __init__(self, points: Sequence[tuple[float, float]]) -> None:
        self.points, self.rows, self.sites = points, {}, {}

    def wants(self, site: AttentionSite) -> bool:
        return not site.cross

    def probs(self, p: Tensor, site: AttentionSite) -> Tensor:
        cells = [cell_index(point, site) for point in self.points]
        self.rows[site.name] = torch.stack([p[row, :, cell].mean(0) for row, cell in enumerate(cells)])
        self.sites[site.name] = site
        return p


def cell_index(point: tuple[float, float], site: AttentionSite) -> int:
    """The image position of `site` that contains `point`, (x, y) in fractions of the frame."""
    return int(point[1] * site.height) * site.width + int(point[0] * site.width)


def point_inside(mask: np.ndarray, seed: int) -> tuple[float, float]:
    """The centre (x, y), in fractions of the frame, of a random cell of a 16×16 grid of which `mask` covers 90 %.

    If the mask covers no cell by as much, it is one of those that it covers most.
    """
    covered = coverage(mask, CELL_GRID, CELL_GRID)
    cells = np.flatnonzero(covered >= min(0.9, covered.max()))
    row, column = divmod(int(np.random.default_rng([seed, 90]).choice(cells)), CELL_GRID)
    return (column + 0.5) / CELL_GRID, (row + 0.5) / CELL_GRID


@torch.no_grad()
def attention_aucs(
    model: StableDiffusion, scenes: Sequence[Scene], prompts: Sequence[str], seeds: Sequence[int]
) -> list[dict[str, Any]]:
    """For each scene, the AUCs of its first object: {"cross" | "self": {layer: {timestep: AUC}}}, all keys as text.

    "cross" is the map of the object's noun, "self" what one cell inside the object attends to, that cell left out; both
    in one prediction from the noised scene.  A cell counts as inside if the mask covers more than half of it.  Where no
    cell of a layer is inside, there is no entry.
    """
    rendered = [render(scene, model.resolution) for scene in scenes]
    masks = [masks[0] for _, masks in rendered]
    latents = model.encode(as_pixels(np.stack([image for image, _ in rendered])))
    conditioning = model.prompts(list(prompts))
    tokens = [token_positions(model, p, s.objects[0].noun) for p, s in zip(prompts, scenes, strict=True)]
    points = [point_inside(mask, seed) for mask, seed in zip(masks, seeds, strict=True)]
    aucs: list[dict[str, Any]] = [{"cross": {}, "self": {}} for _ in scenes]
    for timestep in TIMESTEPS:
        noise = torch.stack([_noise(latents[0], seed, timestep) for seed in seeds])
        times = torch.full((len(scenes),), timestep, device=model.device)
        nouns, cells = NounMaps(tokens), CellRows(points)
        with hooked(model.unet, (nouns, cells)):
            model.predict(model.noised(latents, noise, times), times, conditioning)
        for row, mask in enumerate(masks):
            for kind, hook, point in (("cross", nouns, None), ("self", cells, points[row])):
                for name, site in hook.sites.items():
                    value = _site_auc(hook.rows[name][row], mask, site, point)
                    if value is not None:
                        aucs[row][kind].setdefault(site_label(site), {})[str(timestep)] = round(value, 4)
    return aucs


def site_label(site: AttentionSite) -> str:
    """A layer's name in the results: the size of its maps, then its block, as in `16×16 up_blocks.2.attentions.0`."""
    return f"{site.height}×{site.width} {site.name.split('.transformer_blocks')[0]}"


def _noise(like: Tensor, seed: int, timestep: int) -> Tensor:
    return torch.randn(like.shape, generator=generator(seed, "bench/noise", timestep)).to(like)


def _site_auc(values: Tensor, mask: np.ndarray, site: AttentionSite, point: tuple[float, float] | None) -> float | None:
    scores = values.float().cpu().numpy()
    inside = coverage(mask, site.height, site.width).ravel() > 0.5
    if point is not None:
        own = cell_index(point, site)
        scores, inside = np.delete(scores, own), np.delete(inside, own)
    return auc(scores, inside)
