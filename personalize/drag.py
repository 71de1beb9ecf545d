"""Point drag in one step: warp the noisy latents of a picture and sample them again, nothing trained, no gradient.

    picture → z_0 —inversion→ z_T → z_T′ —sampling→ z_0′            z_T′: moved cells, and what they left filled

The attention of each handle, seen during inversion, says which cells move and how far (`drag_mask`, `drag_field`) and
what fills the cells they leave (`drag_fill`).  Sampling gets keys and values from inversion (`drag_attention`), and
keeps inversion's latents outside the region concerned.

References: Yang et al., "AttentionDrag", IJCAI 2025, arXiv 2506.13301; its paper leaves many numbers open, which are
`DragSettings` here, by default those of Zhao et al., "FastDrag", arXiv 2405.15769, where that has one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args, get_type_hints

import torch
from torch import Tensor

from personalize.attention import attention_sites
from personalize.drag_attention import Arrivals, Carried, Correlation, Projections, finest
from personalize.drag_field import backward, displacement, forward, moved, ratio, stretch
from personalize.drag_fill import averaged, neighbours, repaired
from personalize.drag_mask import Cell, dilated, ratio_mask, shared
from personalize.errors import UserError
from personalize.model import Conditioning, StableDiffusion
from personalize.moves import moves
from personalize.randomness import generator
from personalize.sampling import Edit, LatentEdit, Moves, Run, Step, denoise, trajectory

Point = tuple[float, float]  # (x, y) in latent cells, as people write points; cells are (row, column)


@dataclass(frozen=True)
class DragSettings:
    """Everything a drag may be told; lengths are in latent cells.  UserError for a value out of its range."""

    mode: Literal["move", "deform"] = "move"
    """`move`: all cells of the mask go the whole way.  `deform`, the paper's: each as far as its attention ratio."""
    steps: int = 50
    """Denoising steps of the whole way, T to 0."""
    strength: float = 0.7
    """Share of that way that is inverted and sampled, in (0, 1]."""
    displacement: Literal["attention", "stretch"] = "attention"
    """Of `deform`: how far cells go, by attention ratio or by FastDrag's stretch."""
    mapping: Literal["forward", "backward"] = "forward"
    """Push cells, strongest claim first; or ask each cell where it came from, which leaves no holes in what moved."""
    weights: Literal["distance", "ratio", "winner"] = "distance"
    """How the vectors of several handles mix: by 1 / distance, by ratio, or the nearest alone."""
    mask_threshold: float = 0.3
    """τ in 0..1: cells whose ratio exceeds it move."""
    mask_fewest: int = 9
    """Cells an automatic mask has at least; τ is lowered for it."""
    mask_most: float = 0.4
    """Share of the picture an automatic mask covers at most; τ is raised for it."""
    user_mask: Literal["replace", "intersect"] = "replace"
    """What a given mask does to the automatic one."""
    map_places: tuple[str, ...] = ("up",)
    """Where attention is read: down, mid, up."""
    map_levels: tuple[int, ...] = (0, 1)
    """Which of the resolutions with self-attention are read, 0 the finest (SD 1.x at 512 px: 64 × 64 and 32 × 32)."""
    map_timesteps: tuple[int, int] = (0, 500)
    """First and last timestep, of 0..999, at which attention is read."""
    window: int = 3
    """Side of the square around a handle whose attention is averaged; odd."""
    fill: Literal["bnni", "attention", "attention_raw"] = "bnni"
    """Of what was left: FastDrag's neighbours, attention with repaired variance, or the paper's to the letter."""
    top_k: int = 8
    """Weights that the repaired fill keeps."""
    fill_noise: Literal["white", "source"] = "white"
    """Noise of the repaired fill: drawn, or that of the cell with the largest weight."""
    kv: Literal["replace", "concat", "off"] = "replace"
    """Keys and values of inversion in the decoder's self-attention: in place of sampling's own, beside them, or not."""
    kv_start: int = 0
    """Number of the first sampling step that gets them."""
    kv_levels: tuple[int, ...] | None = None
    """At which resolutions, 0 the finest; all by default."""
    protect: bool = True
    """Keep inversion's latents outside the region concerned."""
    margin: int = 2
    """Cells by which that region is wider than what moved and what was left."""
    seed: int = 42
    """Of the fill's noise."""

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            value, known = getattr(self, name), get_args(hint)
            if isinstance(value, str) and value not in known:
                raise UserError(f"{name} is {value!r}: choose one of {', '.join(known)}")
        limits = {
            "strength": 0 < self.strength <= 1, "mask_threshold": 0 <= self.mask_threshold <= 1,
            "mask_most": 0 < self.mask_most <= 1, "mask_fewest": self.mask_fewest >= 1, "top_k": self.top_k >= 1,
            "window": self.window % 2 == 1 and self.window > 0, "margin": self.margin >= 0, "steps": self.steps >= 1,
        }  # fmt: skip
        for name, within in limits.items():
            if not within:
                raise UserError(f"{name} is {getattr(self, name)}, which is out of its range: see DragSettings")


DEFAULTS = DragSettings()


@dataclass(frozen=True)
class Drag:
    """What a drag made.  Maps are (h, w) on the CPU; k handles.

    latents: z_0′ (1, c, h, w).  mask: what moved.  region: what may differ from the source.  void: what was filled.
    source: the warp, see `drag_field`.  ratios: r_k (k, h, w), not clamped.  thresholds: τ that each handle's mask took
    (none with a mask of the user's).  arrived: where each handle is found in the result, (row, column).
    edit_seconds: time from the end of inversion to the start of sampling.
    """

    latents: Tensor
    mask: Tensor
    region: Tensor
    void: Tensor
    source: Tensor
    ratios: Tensor
    thresholds: tuple[float, ...]
    arrived: tuple[Cell, ...]
    edit_seconds: float


@torch.no_grad()
def drag(
    model: StableDiffusion,
    latents: Tensor,
    conditioning: Conditioning,
    handles: Sequence[Point],
    targets: Sequence[Point],
    settings: DragSettings = DEFAULTS,
    mask: Tensor | None = None,
    visible: Tensor | None = None,
) -> Drag:
    """Drag what lies at each of `handles` to the target of the same number.

    Args:
        latents: of the picture, (1, c, h, w).
        conditioning: one row; it is inverted and sampled without guidance.
        mask: the user's, boolean (h, w).
        visible: boolean (h, w), False where the picture was padded; nothing moves there.

    Raises:
        UserError: a mask that is empty or leaves nothing to fill from, a handle that attention does not single out, or
            settings that select no layer or no step.
    """
    size = (latents.shape[-2], latents.shape[-1])
    cells = [(int(y), int(x)) for x, y in handles]
    vectors = torch.tensor([[ty - y, tx - x] for (x, y), (tx, ty) in zip(handles, targets, strict=True)])
    reading, carrying, edit = _hooks(model, size, conditioning, settings)
    upward = moves(model, settings.steps, strength=settings.strength, inverse=True)
    _check_steps(upward, settings)
    run = trajectory(model, latents, edit, upward)
    began = time.perf_counter()
    every = attention_sites(model.unet, size)
    sites = [every[name] for name in reading.names]
    correlation = Correlation(reading.kept, sites, size, model.device)
    rows = [correlation.around(cell, settings.window) for cell in cells]
    ratios = torch.stack([ratio(row, cell, settings.window) for row, cell in zip(rows, cells, strict=True)])
    masks, thresholds = _masks(ratios, cells, settings, mask)
    masks = masks if visible is None else masks & visible
    source = warp(ratios, masks, cells, vectors, settings)
    start = filled(run, source, masks.any(0), correlation, settings)
    region = dilated(masks.any(0) | _reached(source), settings.margin)
    arrivals = Arrivals(reading.kept, sites, size, cells, settings.window)
    hooks = (arrivals,) if carrying is None else (arrivals, Carried(carrying.kept, settings.kv, settings.kv_start))
    edits = (Protected(region, run),) if settings.protect else ()
    seconds = time.perf_counter() - began
    downward = moves(model, settings.steps, strength=settings.strength)
    result = denoise(model, start, Edit(conditioning, guidance_scale=1, hooks=hooks, latent_edits=edits), downward)
    arrived = tuple(arrivals.cells(region))
    return Drag(result, masks.any(0), region, source < 0, source, ratios, thresholds, arrived, seconds)


def warp(
    ratios: Tensor, masks: Tensor, handles: Sequence[Cell], vectors: Tensor, settings: DragSettings = DEFAULTS
) -> Tensor:
    """The warp (h, w) that `settings` make of ratios r_k and masks M_k (k, h, w) and vectors V_k (k, 2)."""
    how_far = ratios.clamp(0, 1)
    if settings.mode == "move":
        how_far = torch.ones_like(ratios)
    elif settings.displacement == "stretch":
        pairs = zip(masks, handles, strict=True)
        how_far = torch.stack([stretch(mask, handle) if mask.any() else mask.float() for mask, handle in pairs])
    field = displacement(how_far, masks, handles, vectors.float(), settings.weights)
    if settings.mapping == "backward":
        return backward(field, masks.any(0))
    claims = ratios if settings.mode == "move" else how_far
    return forward(field, masks.any(0), (claims * masks).amax(0))


def filled(run: Run, source: Tensor, mask: Tensor, correlation: Correlation, settings: DragSettings) -> Tensor:
    """z_T′ (1, c, h, w): the end of inversion `run`, warped by `source`, its empty cells filled.

    Ω, from which cells are filled, is what the mask leaves: cells of U still show the object at the level where their
    attention was read, so that in `move` they would paint it back.  In `deform` it is all but U.

    Raises:
        UserError: Ω is empty.
    """
    z, clean, alpha = run.latents[-1], run.clean[-1], run.moves.steps[-1].alpha_next
    void, result = source < 0, moved(run.latents[-1], source)
    omega = ~mask if settings.mode == "move" else ~void
    if bool(void.any()) and not bool(omega.any()):
        raise UserError("the mask covers the whole picture, nothing is left to fill from: give a smaller mask")
    if settings.fill == "bnni":
        return neighbours(result, void)
    cells = void.nonzero()
    if settings.fill == "attention_raw":
        contents = averaged(z, cells, omega, correlation.rows)
    else:
        draw = torch.randn(z.shape, generator=generator(settings.seed, "drag/fill"))
        noise = draw if settings.fill_noise == "white" else None
        contents = repaired(z, clean, alpha, cells, omega, correlation.rows, settings.top_k, noise)
    result[0, :, cells[:, 0], cells[:, 1]] = contents
    return result


class Protected(LatentEdit):
    """Outside `region` (h, w) the latents of the inversion `run` at the same level:  z ← G z + (1 − G) z_inv."""

    def __init__(self, region: Tensor, run: Run) -> None:
        self.region, self.latents_before = region.to(run.latents.device), run.latents

    def latents(self, z: Tensor, step: Step) -> Tensor:
        return torch.where(self.region, z, self.latents_before[step.count - 1 - step.index])


def _hooks(
    model: StableDiffusion, size: tuple[int, int], conditioning: Conditioning, settings: DragSettings
) -> tuple[Projections, Projections | None, Edit]:
    """What inversion records: q and k to read attention, k and v to carry over; and the edit that does it."""
    sites = attention_sites(model.unet, size)
    read = finest(sites, settings.map_places, settings.map_levels)
    if not read:
        raise UserError(
            f"no self-attention at places {settings.map_places}, levels {settings.map_levels} of this base: "
            "places are down, mid and up, level 0 is the finest that has any"
        )
    reading = Projections([site.name for site in read], "qk", settings.map_timesteps)
    if settings.kv == "off":
        return reading, None, Edit(conditioning, guidance_scale=1, hooks=(reading,))
    carried = finest(sites, ("up",), settings.kv_levels)
    if not carried:
        raise UserError(f"the decoder has no self-attention at levels {settings.kv_levels}: 0 is the finest")
    carrying = Projections([site.name for site in carried], "kv")
    return reading, carrying, Edit(conditioning, guidance_scale=1, hooks=(reading, carrying))


def _check_steps(plan: Moves, settings: DragSettings) -> None:
    low, high = settings.map_timesteps
    if not any(low <= move.timestep <= high for move in plan):
        seen = ", ".join(f"{move.timestep:g}" for move in plan)
        raise UserError(f"no step is within timesteps {low} to {high}, where attention is to be read: there is {seen}")


def _masks(
    ratios: Tensor, handles: Sequence[Cell], settings: DragSettings, mask: Tensor | None
) -> tuple[Tensor, tuple[float, ...]]:
    """M_k (k, h, w) and the thresholds of the automatic ones."""
    if mask is not None and not bool(mask.any()):
        raise UserError("the mask is empty: what may move is white in it")
    if mask is not None and settings.user_mask == "replace":
        return shared(mask.cpu(), handles), ()
    limits = {"fewest": settings.mask_fewest, "most": settings.mask_most}
    found = [ratio_mask(r, h, settings.mask_threshold, **limits) for r, h in zip(ratios, handles, strict=True)]
    masks = torch.stack([one for one, _ in found])
    if mask is not None and not bool((masks & mask.cpu()).any()):
        raise UserError("the mask has nothing in common with what the handles' attention selects: draw it around them")
    return masks if mask is None else masks & mask.cpu(), tuple(threshold for _, threshold in found)


def _reached(source: Tensor) -> Tensor:
    """Cells that get another cell's content."""
    return (source >= 0) & (source != torch.arange(source.numel()).view(source.shape))


def move_length(vector: Sequence[float]) -> float:
    """Cells that a rigid move by `vector` really goes: the length after rounding."""
    return math.hypot(*(math.floor(part + 0.5) for part in vector))
