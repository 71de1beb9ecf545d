"""Warping pictures in pixels: where each pixel of the result comes from, and what it then shows.

A warp is a tensor of sources s (H, W, 2): the place (x, y) in pixels of the source that each pixel shows.  Whole pixels
have whole coordinates.  It is the inverse of the map p → p′ that the user asks for:

    rigid and affine     p′ = A p + b                        s(q) = A⁻¹ (q − b)
    field                p′ = p + v(p)                       s(q) solves s + v(s) = q, by Newton's method

Because every pixel of the result asks for its source, no holes open inside the moved object.  A field steeper than one
pixel per pixel folds the picture: several places arrive at one pixel, which then shows the one displaced farthest.

References: Inpaint4Drag, arXiv 2509.04582, for warping pixels backward and filling only what is uncovered; Umeyama,
IEEE TPAMI 13(4), 1991, for least-squares similarity.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import conv2d, grid_sample, pad

from personalize.editing.drag.mask import dilated
from personalize.editing.drag.points import Point
from personalize.errors import UserError

FINE = 4  # places per pixel and side that a field is tried at; a field stretches by less than this, or holes open
NEWTON = 4  # iterations, from a start that is right to a pixel
NOWHERE = -1e4  # px, the source of a pixel at which nothing arrives: outside of every picture


def least_squares_map(sources: Sequence[Point], targets: Sequence[Point], kind: str) -> Tensor:
    """The map (2, 3), float64, that takes `sources` to `targets` with the least squared error.

    Args:
        kind: "similarity" is p′ = s R p + b with a scale s > 0 and a rotation R; "affine" is p′ = A p + b.

    Raises:
        UserError: there are too few points (2 for a similarity, 3 for an affine map), or they lie at one place or, for
            an affine map, on one line.
    """
    start, end = (torch.tensor(list(points), dtype=torch.float64) for points in (sources, targets))
    fewest = {"similarity": 2, "affine": 3}[kind]
    if len(start) < fewest:
        raise UserError(f"{len(start)} pairs of points: a region's {kind} map needs at least {fewest}, or boxes")
    middle, goal = start.mean(0), end.mean(0)
    a, b = start - middle, end - goal
    if torch.linalg.matrix_rank(a, rtol=1e-6) < (1 if kind == "similarity" else 2):
        raise UserError(f"the points of the region lie on one line or at one place: a {kind} map needs them apart")
    if kind == "affine":
        matrix = torch.linalg.lstsq(a, b).solution.T
    else:  # complex numbers: b ≈ z a with z = s e^{iφ}
        first, second = (torch.complex(part[:, 0], part[:, 1]) for part in (a, b))
        z = (first.conj() * second).sum() / first.abs().square().sum()
        matrix = torch.stack([torch.stack([z.real, -z.imag]), torch.stack([z.imag, z.real])])
    if abs(float(torch.linalg.det(matrix))) < 1e-6:
        raise UserError("the targets of the region lie on one line or at one place: nothing would be left of it")
    return torch.cat([matrix, (goal - matrix @ middle)[:, None]], 1)


def translation(vector: Point) -> Tensor:
    """The map (2, 3) that moves everything by `vector` (x, y)."""
    return torch.tensor([[1, 0, vector[0]], [0, 1, vector[1]]], dtype=torch.float64)


def mapped(matrix: Tensor, point: Point) -> Point:
    """`point` (x, y) after the map `matrix` (2, 3)."""
    x, y = (matrix[:, :2] @ torch.tensor(point, dtype=torch.float64) + matrix[:, 2]).tolist()
    return x, y


def affine_sources(matrix: Tensor, size: tuple[int, int]) -> Tensor:
    """The warp s (H, W, 2) of the map `matrix` (2, 3)."""
    back = torch.linalg.inv(matrix[:, :2])
    columns, rows = (torch.arange(side, dtype=torch.float64) for side in (size[1], size[0]))
    parts = [
        x * columns + (y * rows)[:, None] - offset for (x, y), offset in zip(back, back @ matrix[:, 2], strict=True)
    ]
    return torch.stack([part.float() for part in parts], -1)


def field_sources(field: Tensor, mask: Tensor) -> Tensor:
    """The warp s (H, W, 2) of the displacements v (H, W, 2), as (x, y), of the pixels inside `mask` (H, W).

    s(q) + v(s(q)) = q.  Where several places arrive at q, the one with the largest ‖v‖ is taken, so that the part that
    is dragged lies on top of what it is dragged over.  A pixel at which nothing from within a pixel of the mask arrives
    has a source outside of the picture.
    """
    displacement = field.permute(2, 0, 1)
    sources = _first_sources(displacement, dilated(mask, 1))
    arrived = sources[..., 0] != NOWHERE
    goals, places = whole_places((mask.shape[0], mask.shape[1]))[arrived], sources[arrived]
    for _ in range(NEWTON):
        missed = goals - places - _moves(displacement, places)
        across, down = (_moves(displacement, places + half) - _moves(displacement, places - half)
                        for half in torch.eye(2) / 2)  # fmt: skip
        slopes = torch.eye(2) + torch.stack([across, down], -1)  # ∂(s + v)/∂s, (n, 2, 2); singular along a fold
        steps = torch.linalg.solve_ex(slopes, missed[..., None]).result[..., 0]
        places = places + steps.nan_to_num(0, 0, 0).clamp(-1, 1)
    sources[arrived] = places
    return sources


def _first_sources(displacement: Tensor, mask: Tensor) -> Tensor:
    """For each pixel a place in `mask` that arrives within half a pixel: the one from farthest, (H, W, 2)."""
    height, width = mask.shape
    offsets = (torch.arange(FINE) + 0.5) / FINE - 0.5
    fine = torch.cartesian_prod(offsets, offsets).flip(-1)
    places = (mask.nonzero().flip(-1)[:, None] + fine).flatten(0, 1)  # (n, 2), as (x, y)
    moves = _moves(displacement, places)
    aims = (places + moves).round().long()
    inside = ((aims >= 0) & (aims < torch.tensor([width, height]))).all(-1)
    places, goal, far = places[inside], aims[inside] @ torch.tensor([1, width]), moves[inside].norm(dim=-1)
    farthest = torch.full((height * width,), -1.0).scatter_reduce(0, goal, far, "amax")
    wins = far == farthest[goal]
    first = torch.full((height * width,), len(places)).scatter_reduce(0, goal[wins], wins.nonzero()[:, 0], "amin")
    return torch.cat([places, torch.full((1, 2), NOWHERE)])[first].view(height, width, 2)


def _moves(displacement: Tensor, places: Tensor) -> Tensor:
    """The displacements (n, 2) of the places (n, 2), both (x, y): `displacement` (2, H, W) between its pixels."""
    return sampled(displacement, places[None], "bilinear", "border")[:, 0].T


def warped_layer(pixels: Tensor, mask: Tensor, sources: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """What is inside `mask` (H, W) of `pixels` (c, H, W), warped: its pixels, and its opacity (H, W) in [0, 1].

    Args:
        scale: the map's linear scale, see `scaled_down`.
    """
    opacity = sampled(mask[None].float(), sources, "bilinear")[0]
    return sampled(scaled_down(pixels, scale), sources, "bicubic").clamp(-1, 1), opacity


def scaled_down(pixels: Tensor, scale: float) -> Tensor:
    """`pixels` (c, H, W) blurred so that a map with this linear `scale` below 1 does not alias."""
    return pixels if scale >= 1 else _blurred(pixels, 0.5 * math.sqrt(scale**-2 - 1))


def whole_places(size: tuple[int, int]) -> Tensor:
    """The warp (H, W, 2) that changes nothing: every pixel's own (x, y)."""
    rows, columns = torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="ij")
    return torch.stack([columns, rows], -1).float()


def sampled(picture: Tensor, sources: Tensor, mode: str, outside: str = "zeros") -> Tensor:
    """`picture` (c, H, W) at the places `sources` (H, W, 2); outside of it 0, or with "border" its nearest pixel."""
    height, width = picture.shape[-2:]
    scale = torch.tensor([2 / max(1, width - 1), 2 / max(1, height - 1)])
    return grid_sample(picture[None], (sources * scale - 1)[None], mode, outside, align_corners=True)[0]


def _blurred(pixels: Tensor, sigma: float) -> Tensor:
    """`pixels` (c, H, W) after a Gaussian blur by `sigma` pixels."""
    reach = math.ceil(3 * sigma)
    weights = torch.exp(-(torch.arange(-reach, reach + 1.0) ** 2) / (2 * sigma**2))
    kernel, channels = weights / weights.sum(), len(pixels)
    wide = pad(pixels[None], (reach,) * 4, mode="replicate")
    rows = conv2d(wide, kernel.view(1, 1, 1, -1).repeat(channels, 1, 1, 1), groups=channels)
    return conv2d(rows, kernel.view(1, 1, -1, 1).repeat(channels, 1, 1, 1), groups=channels)[0]
