"""The options of a drag.

`DragSettings` is read by the command line before torch is imported, so this file imports nothing heavy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from personalize.errors import UserError
from personalize.models.ranges import check_ranges

STRENGTHS = {"pixels": 0.5, "latents": 0.7}  # measured in tests/bench/drag; the paper of FastDrag
_FOREIGN = {("clone", "latents"), ("smooth", "latents"), ("attention_raw", "pixels")}
FILLS = {"pixels": "clone", "latents": "bnni"}


@dataclass(frozen=True)
class DragSettings:
    """All options of a drag.  Lengths are in latent cells where nothing else is said.

    Raises:
        UserError: a value is out of its range, or belongs to the other method.
    """

    method: Literal["pixels", "latents"] = "pixels"
    """`pixels`: the picture is warped, and only the place that the object left is sampled anew.  `latents`: noisy
    latents are warped once and all is sampled again, as AttentionDrag and FastDrag do."""
    mode: Literal["move", "deform", "region"] = "move"
    """`move`: the object is displaced as a whole.  `deform`: each part by a fraction of the vector, as published.
    `region`: the object or the given region is moved, turned and scaled as several pairs of points say."""
    region_map: Literal["similarity", "affine"] = "similarity"
    """What a `region` may do: be moved, turned and scaled as a whole; or also be sheared and stretched."""
    steps: int = 10
    """Denoising steps of a full schedule, from T to 0; `strength` of them are taken."""
    strength: float | None = None
    """Fraction of the schedule that is sampled, in (0, 1]; None: 0.5 for `pixels`, 0.7 for `latents`."""
    displacement: Literal["attention", "stretch"] = "attention"
    """The fraction in `deform`: the ratio of a cell's attention to the handle's, or FastDrag's stretch factor, which is
    also taken with a mask that replaces what attention finds."""
    mapping: Literal["forward", "backward"] = "forward"
    """In `latents`: find each cell's destination; or each destination's source, which leaves no holes."""
    weights: Literal["distance", "ratio", "winner"] = "distance"
    """How the vectors of several handles are weighted: by 1 / distance, by ratio, or the nearest handle's alone."""
    mask_threshold: float = 0.3
    """τ in [0, 1]: cells whose attention ratio exceeds it move."""
    mask_fewest: int = 9
    """Least number of cells of an automatic mask; τ is lowered to reach it."""
    mask_most: float = 0.4
    """Largest fraction of the picture that an automatic mask may cover; τ is raised to keep it."""
    user_mask: Literal["replace", "intersect"] = "replace"
    """Use a given mask in place of the automatic one, or the intersection of both."""
    grow: int = 0
    """In `pixels`: number of pixels by which the mask is extended on all sides; negative numbers shrink it."""
    refine: bool = True
    """In `pixels`: find the border of the automatic mask by colour and by a second look at the attention."""
    clearance: float = 1.0
    """In `pixels`: width of the band around the object's old place that is filled too, for soft edges and shadows."""
    map_places: tuple[str, ...] = ("up",)
    """Parts of the UNet whose attention is read: "down", "mid", "up"."""
    map_levels: tuple[int, ...] = (0, 1)
    """Resolutions with self-attention that are read, 0 the finest (SD 1.x at 512 px: 0 is 64 × 64, 1 is 32 × 32)."""
    map_timesteps: tuple[int, int] = (0, 500)
    """In `latents`: first and last timestep, in 0…999, at which attention is read."""
    window: int = 3
    """Side of the square of cells around a handle whose attention is averaged; odd."""
    fill: Literal["clone", "smooth", "bnni", "attention", "attention_raw"] | None = None
    """What the void holds when sampling begins: the most similar part of the picture, or the colours around it (both
    `pixels` alone); FastDrag's BNNI; attention with corrected noise; attention as published (`latents` alone).  None:
    clone for `pixels`, bnni for `latents`."""
    top_k: int = 8
    """Number of attention weights that `attention` keeps for each cell."""
    fill_noise: Literal["white", "source"] = "white"
    """In `latents`: noise that `attention` adds: drawn anew, or that of the cell with the largest weight."""
    fill_keys: Literal["background", "all"] = "background"
    """In `pixels`: what filling may attend to: cells outside the object's old and new place, or all cells."""
    kv: Literal["replace", "concat", "off"] = "replace"
    """In `latents`: use the inversion's keys and values in the decoder: alone, besides sampling's own, or not."""
    kv_start: int = 0
    """Index of the first sampling step that uses them."""
    kv_levels: tuple[int, ...] | None = None
    """Resolutions at which they are used, 0 the finest; by default all."""
    protect: bool = True
    """Hold what is not filled at every step: to the warped picture (`pixels`), to the inversion (`latents`)."""
    margin: int = 2
    """In `latents`: number of cells by which the changed region extends beyond the cells moved or filled."""
    seed: int = 42
    """Seed of the noise."""

    @property
    def sampled_share(self) -> float:
        """`strength`, or what it is for this method by default."""
        return STRENGTHS[self.method] if self.strength is None else self.strength

    @property
    def first_fill(self) -> str:
        """`fill`, or what it is for this method by default."""
        return FILLS[self.method] if self.fill is None else self.fill

    def __post_init__(self) -> None:
        check_ranges(self)
        limits = {
            "strength": (0 < self.sampled_share <= 1, "give a fraction above 0, at most 1"),
            "mask_most": (self.mask_most > 0, "give a fraction above 0, at most 1"),
            "mask_fewest": (self.mask_fewest >= 1, "give 1 or more"),
            "top_k": (self.top_k >= 1, "give 1 or more"),
            "window": (self.window % 2 == 1, "give an odd number"),
            "steps": (self.steps >= 1, "give 1 or more"),
        }
        for name, (within, advice) in limits.items():
            if not within:
                raise UserError(f"{name} is {getattr(self, name)}: {advice}")
        if (self.first_fill, self.method) in _FOREIGN:
            raise UserError(f"fill {self.fill} does not belong to the method {self.method}: choose bnni or attention")
        if (self.mode, self.method) == ("region", "latents"):
            raise UserError("mode region needs the method pixels: latents can only be moved by whole cells")


DEFAULTS = DragSettings()
