"""The options of `personalize drag`.  This module imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from tyro.conf import Positional, arg

from personalize.cli.checks import check_drag
from personalize.editing.drag.config import DEFAULTS
from personalize.models.config import InferenceOptions


@dataclass(frozen=True)
class DragConfig(InferenceOptions):
    """Drag points of a picture: what is at each --from moves to its --to; nothing is trained.

    Writes the picture, the mask of what moved, an overlay with mask and points, and where the points arrived; with
    --preview the mask, the warped picture and the void, which take no sampling.  Inpainting models are taken as bases.
    """

    inpainting: ClassVar[bool] = True
    photo: Positional[Path]
    """The picture."""
    from_: Annotated[tuple[str, ...], arg(name="from")]
    """Point to drag as x,y in pixels; or several.  With `--mode region` also a box
    left,top,right,bottom or a polygon x,y,x,y,x,y…"""
    to: tuple[str, ...]
    """Target as x,y in pixels, the first for the first --from, and so on."""
    preview: bool = False
    """Only show what will move and what must be filled; nothing is sampled."""
    mask: Path | None = None
    """Picture of the same size, white where things may move; by default attention finds what is at the points."""
    add: tuple[str, ...] = ()
    """Point x,y on a part of the thing that the automatic mask misses; or several."""
    remove: tuple[str, ...] = ()
    """Point x,y on something that the automatic mask should leave out; or several."""
    grow: int = 0
    """Extend the mask by so many pixels on all sides."""
    shrink: int = 0
    """Shrink the mask by so many pixels on all sides."""
    mode: Literal["move", "deform", "region"] = DEFAULTS.mode
    """move: the thing moves as a whole.  deform: it stretches, each part as far as it belongs to the point.  region: it
    is moved, turned and scaled as two or more points, or boxes or polygons, say."""
    region_map: Literal["similarity", "affine"] = DEFAULTS.region_map
    """With `--mode region`: move, turn and scale as a whole (2 points); or shear and stretch too (3 points, boxes)."""
    method: Literal["pixels", "latents"] = DEFAULTS.method
    """pixels: warp the picture and sample only what was uncovered.  latents: as AttentionDrag and FastDrag do."""
    prompt: str | None = None
    """What the picture shows; by default what the adapter has learned, or nothing."""
    adapter: Path | None = None
    """Adapter folder trained on this picture, if there is one."""
    mask_threshold: float = DEFAULTS.mask_threshold
    """Higher values, up to 1, move less of the picture."""
    mask_most: float = DEFAULTS.mask_most
    """Largest share of the picture that the automatic mask may cover; more is taken for background and refused."""
    refine: bool = DEFAULTS.refine
    """Find the mask's border by colour and a second look at the attention; without, the mask has whole latent cells."""
    user_mask: Literal["replace", "intersect"] = DEFAULTS.user_mask
    """Whether --mask takes the place of the automatic mask, or what both have in common moves."""
    weights: Literal["distance", "ratio", "winner"] = DEFAULTS.weights
    """How points on one thing share it: by 1 / distance, by attention, or the nearest one alone."""
    displacement: Literal["attention", "stretch"] = DEFAULTS.displacement
    """How far parts move in `deform`: by their attention, or by their distance as in FastDrag."""
    fill: Literal["clone", "smooth", "bnni", "attention", "attention_raw"] | None = DEFAULTS.fill
    """What its old place holds when sampling begins: the most similar part of the picture; colours around; FastDrag's
    neighbours; attention, corrected or as published (`latents` alone).  By default clone, bnni for latents."""
    clearance: float = DEFAULTS.clearance
    """Width in latent cells of the band around the thing's old place that is filled too, for edges and shadows."""
    fill_keys: Literal["background", "all"] = DEFAULTS.fill_keys
    """What filling may look at: the background, or the thing too, which draws it again where it was."""
    protect: bool = DEFAULTS.protect
    """Hold all that is not filled at every step."""
    num_inference_steps: int = DEFAULTS.steps
    """Denoising steps of the full schedule."""
    strength: float | None = DEFAULTS.strength
    """Fraction of the schedule that is sampled; by default 0.5 for pixels, 0.7 for latents."""
    seed: int = DEFAULTS.seed
    """Seed of the noise."""
    resolution: int | None = None
    """Larger pictures are scaled down to about resolution² pixels; by default the base model's own."""
    paste: bool = False
    """With `--method latents`: copy the picture's own pixels to where nothing was to change; pixels always does."""
    keep_exif: bool = False
    """Keep the photo's EXIF data (place, camera, owner) in the result; by default none of it is written anywhere."""
    output_dir: Path = Path("personalize-drag")
    """Folder for the pictures and drag.json."""

    @property
    def adapters(self) -> tuple[Path, ...]:
        """The adapter, if one is named."""
        return () if self.adapter is None else (self.adapter,)

    def check(self) -> None:
        super().check()
        check_drag(self)
