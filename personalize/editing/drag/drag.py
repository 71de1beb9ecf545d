"""Dragging points of a picture: its noisy latents are warped once and sampled again; no training and no gradients.

    picture → z_0 —inversion→ z_T —warp and fill→ z_T′ —sampling→ z_0′

During inversion the self-attention of each handle is recorded.  It decides which cells move (`mask`), how far
(`warp`), and what fills the cells they leave (`fill`).  Sampling uses keys and values recorded during
inversion (`attention`), and outside the changed region the latents of the inversion.

References: Yang et al., "AttentionDrag", IJCAI 2025, arXiv 2506.13301.  Numbers that the paper does not give are fields
of `DragSettings`; their defaults are those of Zhao et al., "FastDrag", arXiv 2405.15769, where that paper gives them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from personalize.editing.drag.attention import (
    AttentionRows,
    KeyValueInjection,
    PointTracker,
    QKVRecorder,
    self_attention_sites,
)
from personalize.editing.drag.config import DEFAULTS, DragSettings
from personalize.editing.drag.fill import attention_fill, bnni_fill, raw_attention_fill
from personalize.editing.drag.mask import Cell, dilated, masks_per_handle, ratio_mask
from personalize.editing.drag.points import Point
from personalize.editing.drag.reading import read_sites
from personalize.editing.drag.warp import (
    attention_ratio,
    backward_warp,
    displacement_field,
    forward_warp,
    stretch_factors,
    warped,
)
from personalize.errors import UserError
from personalize.models.attention import AttentionHook, attention_sites
from personalize.models.stable_diffusion import Conditioning, StableDiffusion
from personalize.randomness import generator
from personalize.sampling.denoise import DenoisingHistory, Edit, LatentEdit, denoise, denoise_with_history
from personalize.sampling.schedule import Schedule, Step, make_schedule


@dataclass(frozen=True)
class LatentDrag:
    """The result of `drag`.  Maps are (h, w) on the CPU, for k handles.

    latents: z_0′ (1, c, h, w).
    mask: cells that were moved.  void: cells that were filled.  region: cells that may differ from the source.
    source: the warp, see `personalize.editing.drag.warp`.
    ratios: attention ratios r_k (k, h, w), not clamped.
    thresholds: τ of each handle's automatic mask; empty if the user's mask was used alone.
    arrived: the cell (row, column) of the result that resembles each handle most.
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
) -> LatentDrag:
    """Move what is at each of `handles` to the target with the same index.

    Args:
        latents: the encoded picture, (1, c, h, w).
        conditioning: one row, used for inversion and for sampling, without guidance.
        handles, targets: (x, y) in latent cells; a `Cell`, in contrast, is (row, column).
        mask: the user's mask, boolean (h, w), True where things may move.
        visible: boolean (h, w), False where the picture was padded; padding never moves.

    Raises:
        UserError: the mask is empty or leaves no cell to fill from, attention does not set a handle apart from the
            rest of the picture, or `settings` select no layer or no step.
    """
    size = (latents.shape[-2], latents.shape[-1])
    cells = [(int(y), int(x)) for x, y in handles]
    vectors = torch.tensor([[ty - y, tx - x] for (x, y), (tx, ty) in zip(handles, targets, strict=True)])
    queries_keys, keys_values, edit = _recorders(model, size, conditioning, settings)
    upward = make_schedule(model, settings.steps, strength=settings.sampled_share, inverse=True)
    _check_steps(upward, settings)
    inversion = denoise_with_history(model, latents, edit, upward)
    began = time.perf_counter()
    all_sites = attention_sites(model.unet, size)
    sites = [all_sites[name] for name in queries_keys.names]
    attention = AttentionRows(queries_keys.kept, sites, size, model.device)
    rows = [attention.around(cell, settings.window) for cell in cells]
    ratios = torch.stack([attention_ratio(row, cell, settings.window) for row, cell in zip(rows, cells, strict=True)])
    masks, thresholds = _masks(ratios, cells, settings, mask)
    masks = masks if visible is None else masks & visible
    source = warp(ratios, masks, cells, vectors, settings)
    start = filled_latents(inversion, source, masks.any(0), attention, settings)
    region = dilated(masks.any(0) | _replaced(source), settings.margin)
    tracker = PointTracker(queries_keys.kept, sites, size, cells, settings.window)
    hooks: tuple[AttentionHook, ...] = (tracker,)
    if keys_values is not None:
        hooks += (KeyValueInjection(keys_values.kept, settings.kv, settings.kv_start),)
    edits = (ProtectedBackground(region, inversion),) if settings.protect else ()
    seconds = time.perf_counter() - began
    downward = make_schedule(model, settings.steps, strength=settings.sampled_share)
    result = denoise(model, start, Edit(conditioning, guidance_scale=1, hooks=hooks, latent_edits=edits), downward)
    arrived = tuple(tracker.cells(region))
    return LatentDrag(result, masks.any(0), region, source < 0, source, ratios, thresholds, arrived, seconds)


def warp(
    ratios: Tensor, masks: Tensor, handles: Sequence[Cell], vectors: Tensor, settings: DragSettings = DEFAULTS
) -> Tensor:
    """The warp of ratios r_k (k, h, w), masks M_k (k, h, w) and vectors V_k (k, 2), see `displacement_field`."""
    factors = ratios.clamp(0, 1)
    if settings.mode == "move":
        factors = torch.ones_like(ratios)
    elif settings.displacement == "stretch":
        pairs = zip(masks, handles, strict=True)
        factors = torch.stack([stretch_factors(mask, handle) if mask.any() else mask.float() for mask, handle in pairs])
    field = displacement_field(factors, masks, handles, vectors.float(), settings.weights, ratios.clamp(0, 1))
    if settings.mapping == "backward":
        return backward_warp(field, masks.any(0))
    claims = ratios if settings.mode == "move" else factors
    return forward_warp(field, masks.any(0), (claims * masks).amax(0))


def filled_latents(
    inversion: DenoisingHistory, source: Tensor, mask: Tensor, attention: AttentionRows, settings: DragSettings
) -> Tensor:
    """z_T′ (1, c, h, w): the last latents of `inversion`, warped by `source`, with the empty cells U filled.

    In the mode `move` cells are filled from Ω = all cells outside `mask`.  The attention of U was recorded while U
    showed the object, so that filling from inside the mask would draw the object again.  In `deform` Ω is all but U.

    Raises:
        UserError: Ω is empty.
    """
    z, clean, alpha = inversion.latents[-1], inversion.clean[-1], inversion.schedule.steps[-1].alpha_next
    void, result = source < 0, warped(z, source)
    omega = ~mask if settings.mode == "move" else ~void
    if bool(void.any()) and not bool(omega.any()):
        raise UserError("the mask covers the whole picture, so that nothing is left to fill from: give a smaller mask")
    if settings.first_fill == "bnni":
        return bnni_fill(result, void)
    cells = void.nonzero()
    if settings.first_fill == "attention_raw":
        contents = raw_attention_fill(z, cells, omega, attention.rows)
    else:
        draw = torch.randn(z.shape, generator=generator(settings.seed, "drag/fill"))
        noise = draw if settings.fill_noise == "white" else None
        contents = attention_fill(z, clean, alpha, cells, omega, attention.rows, settings.top_k, noise)
    result[0, :, cells[:, 0], cells[:, 1]] = contents
    return result


class ProtectedBackground(LatentEdit):
    """Keeps the latents of `inversion` at the same noise level outside `region` G (h, w):  z ← G z + (1 − G) z_inv."""

    def __init__(self, region: Tensor, inversion: DenoisingHistory) -> None:
        self.region, self.inverted = region.to(inversion.latents.device), inversion.latents

    def latents(self, z: Tensor, step: Step) -> Tensor:
        return torch.where(self.region, z, self.inverted[step.count - 1 - step.index])


def _recorders(
    model: StableDiffusion, size: tuple[int, int], conditioning: Conditioning, settings: DragSettings
) -> tuple[QKVRecorder, QKVRecorder | None, Edit]:
    """Recorders of q and k, for attention, and of k and v, for sampling (None if not used), and the edit with them."""
    read = read_sites(model, size, settings)
    queries_keys = QKVRecorder([site.name for site in read], "qk", settings.map_timesteps)
    if settings.kv == "off":
        return queries_keys, None, Edit(conditioning, guidance_scale=1, hooks=(queries_keys,))
    decoder = self_attention_sites(attention_sites(model.unet, size), ("up",), settings.kv_levels)
    if not decoder:
        raise UserError(f"the decoder has no self-attention at levels {settings.kv_levels}: 0 is the finest")
    keys_values = QKVRecorder([site.name for site in decoder], "kv", shared=queries_keys.kept)
    return queries_keys, keys_values, Edit(conditioning, guidance_scale=1, hooks=(queries_keys, keys_values))


def _check_steps(schedule: Schedule, settings: DragSettings) -> None:
    """UserError unless attention can be read at some step of the inversion."""
    low, high = settings.map_timesteps
    if not any(low <= step.timestep <= high for step in schedule):
        known = ", ".join(f"{step.timestep:g}" for step in schedule)
        raise UserError(f"no step has a timestep in {low} to {high}, where attention is read: the steps are {known}")


def _masks(
    ratios: Tensor, handles: Sequence[Cell], settings: DragSettings, mask: Tensor | None
) -> tuple[Tensor, tuple[float, ...]]:
    """The masks M_k (k, h, w), and the thresholds of the automatic ones."""
    if mask is not None and not bool(mask.any()):
        raise UserError("the mask is empty: paint white what may move")
    if mask is not None and settings.user_mask == "replace":
        return masks_per_handle(mask.cpu(), handles), ()
    limits = {"fewest": settings.mask_fewest, "most": settings.mask_most}
    pairs = zip(ratios, handles, strict=True)
    automatic = [ratio_mask(ratio, handle, settings.mask_threshold, **limits) for ratio, handle in pairs]
    masks = torch.stack([one for one, _ in automatic])
    if mask is not None and not bool((masks & mask.cpu()).any()):
        raise UserError("the mask has nothing in common with what the handles' attention selects: draw it around them")
    return masks if mask is None else masks & mask.cpu(), tuple(threshold for _, threshold in automatic)


def _replaced(source: Tensor) -> Tensor:
    """The cells (h, w) that receive another cell's content."""
    return (source >= 0) & (source != torch.arange(source.numel()).view(source.shape))


def rounded_length(vector: Sequence[float]) -> float:
    """Length in cells of `vector` after its parts are rounded to whole cells, as a warp rounds them."""
    return math.hypot(*(math.floor(part + 0.5) for part in vector))
