"""A photo edited by text: inverted once, then sampled beside itself with another prompt.

photo → latents → trajectory (`personalize.inversion`) → rows source, target under `personalize.make_controls` → picture

Beside that, if asked for: nouns that look at their own things (`personalize.localization`), a clean auxiliary picture
where nothing changes (`personalize.uniform`), and mutual self-attention in the place of Prompt-to-Prompt.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from personalize import calibrated
from personalize.adapter import Adapter
from personalize.alignment import FUNCTION_WORDS, Tokens, swap_words, tokenize_prompt
from personalize.attachment import applied
from personalize.concept_maps import overlay
from personalize.controls import Controls, ControlSettings, MapSum, make_controls
from personalize.dragging import pasted
from personalize.dynamic_prompts import DynamicSettings
from personalize.errors import UserError
from personalize.frames import Frame, Picture, opened
from personalize.images import to_image
from personalize.inversion import STRENGTH
from personalize.localization import AUTO_REGIONS, NounRegions
from personalize.model import StableDiffusion
from personalize.moves import make_schedule
from personalize.mutual import MutualAttention
from personalize.null_text import NullTextSettings
from personalize.photo_parts import PreparedImage, cells, dynamic_noun_sheet, mask_sheet, pixel_size, prepare_image
from personalize.pictures import grid
from personalize.sampling import denoise
from personalize.trajectories import Trajectory
from personalize.uniform import UniformSettings

PUNCTUATION = ".,;:!?'’-()"  # has no place in the sheet of words


@dataclass(frozen=True)
class EditRequest:
    """What a photo is to show: `target`, or the source prompt with `swaps` (old, new); one of them, or weights alone.

    weights: factors on the attention to words of the target.
    local: (word of the source, word of the target): the photo may change only where these look.
    mask: for uniform maps, white where the photo may change, in place of the mask they find.
    strict: for uniform maps, put the photo's own pixels back outside the mask.
    things: for dynamic prompts, what the photo shows where.
    """

    target: str = ""
    swaps: Sequence[tuple[str, str]] = ()
    weights: Mapping[str, float] = field(default_factory=dict)
    local: Sequence[tuple[str, str]] = ()
    mask: Picture | None = None
    strict: bool = False
    regions: NounRegions = AUTO_REGIONS

    def prompt(self, source: Tokens) -> str:
        """The target prompt.  UserError if nothing is asked for, or two things, or a swapped word is not there."""
        if self.target.strip() and self.swaps:
            raise UserError("a target and words to swap are two ways to say one thing: give one of them")
        if not self.target.strip() and not self.swaps and not self.weights:
            raise UserError("nothing is to change: give a target prompt, words to swap, or weights of words")
        return self.target.strip() or swap_words(source, self.swaps)


@dataclass(frozen=True)
class PhotoSettings:
    """How a photo is edited; see `invert` and `ControlSettings`."""

    inversion: str = "direct"
    steps: int = 50
    strength: float | None = None
    """Share of the way that is inverted; by default all of it, with ddpm 0.64."""
    guidance_scale: float | None = None
    """Of the edit; by default what suits the base: 7.5, with ddpm 15; on the package's model 4 and 6."""
    seed: int = 0
    null_text: NullTextSettings | None = None
    """How null embeddings are fitted; by default as suits the base."""
    fixed_point: int = 0
    """Fixed-point iterations at each step of inverting."""
    controller: Literal["p2p", "mutual"] = "p2p"
    """Prompt-to-Prompt, or mutual self-attention, whose source row is told nothing, as published."""
    control: ControlSettings = ControlSettings()
    dynamic: DynamicSettings | None = None
    """Dynamic prompts; with p2p alone."""
    uniform: UniformSettings | None = None
    """Uniform attention maps."""
    resolution: int | None = None

    def __post_init__(self) -> None:
        if self.controller == "mutual" and self.dynamic is not None:
            raise UserError("mutual attention has no source prompt whose nouns could be dynamic: use one of them")

    def guidance(self, base: str) -> float:
        return calibrated.guidance(base, self.inversion) if self.guidance_scale is None else self.guidance_scale

    def fit(self, base: str) -> NullTextSettings:
        return self.null_text or calibrated.settings_for(NullTextSettings, base)

    @property
    def share(self) -> float:
        return STRENGTH.get(self.inversion, 1.0) if self.strength is None else self.strength


PHOTO_DEFAULTS = PhotoSettings()


@dataclass(frozen=True)
class EditResult:
    """What came of it; pictures have the photo's size.

    reconstruction: the source row, what is left of the photo itself.  sheet: photo, reconstruction and edit in a row.
    attention: where each word looks, if asked for.  latents: (2, c, h, w), source and target, or the source alone.
    nouns: where each noun looked before and after it was made dynamic.  masks: what uniform maps let change, by step;
    region is all of it, boolean (h, w).
    notes: what the user should know.
    """

    image: Image.Image
    reconstruction: Image.Image
    sheet: Image.Image
    attention: Image.Image | None
    target: str
    latents: Tensor
    trajectory: Trajectory
    seconds: float
    notes: tuple[str, ...] = ()
    nouns: Image.Image | None = None
    masks: Image.Image | None = None
    region: Tensor | None = None


@torch.no_grad()
def edit_photo(
    model: StableDiffusion,
    picture: Picture,
    source: str,
    request: EditRequest,
    settings: PhotoSettings = PHOTO_DEFAULTS,
    *,
    adapter: Adapter | None = None,
    folder: str | Path | None = None,
    cache: str | Path | None = None,
    attention: bool = False,
) -> EditResult:
    """Edit a photo that shows `source` as `request` says.

    Args:
        folder, cache: where the trajectory is kept and found again; see `invert`.
        attention: draw where each word looks.

    A target that says what the source says gives the reconstruction, and a note.

    Raises:
        UserError: what `EditRequest`, `invert` and `make_controls` refuse; nothing is written then but the trajectory.
    """
    began = time.perf_counter()
    frame = Frame.of(model, opened(picture), settings.resolution)
    with applied(model, adapter):
        told = tokenize_prompt(model, source)
        target = request.prompt(told)
        same = tokenize_prompt(model, target).ids == told.ids and all(factor == 1 for factor in request.weights.values())
        guide = None if same else _controls(model, frame, told, target, request, settings, attention)
        part = prepare_image(model, frame, source, request, settings, folder, cache, plain=same)
        scale = settings.guidance(model.name)
        latents = part.trajectory.replay(model, scale) if guide is None else _sampled(
            model, frame, part, source, target, guide, scale
        )  # fmt: skip
        nouns = None if part.dynamic is None or not attention else dynamic_noun_sheet(model, frame, part)
    pixels = model.decode(latents).cpu()
    pictures = [frame.to_picture(row[None]) for row in pixels]
    if request.strict and part.blend is not None:
        pictures[-1] = pasted(pictures[-1], frame.picture, frame.mask_to_picture(part.blend.edited_region()), frame.factor)
    drawn = [frame.picture, *pictures] if len(pictures) == 2 else [frame.picture, *pictures * 2]
    sheet = grid([drawn], columns=("photo", "reconstruction", "edit"), title=f"{target} (was: {source})", cell=256)
    maps = None
    if guide is not None and attention and guide.maps is not None:
        maps = word_sheet(guide, guide.maps, [to_image(row) for row in pixels], frame.size)
    notes = ("the target says what the source says: this is the reconstruction",) if guide is None else ()
    notes = (*notes, *(part.found.notes if part.found else ()))
    masks = None if part.blend is None else mask_sheet(frame, part.blend)
    region = None if part.blend is None else part.blend.edited_region()
    seconds = time.perf_counter() - began
    return EditResult(drawn[-1], drawn[1], sheet, maps, target, latents, part.trajectory, seconds, notes, nouns, masks,
                  region)  # fmt: skip


def _controls(
    model: StableDiffusion, frame: Frame, source: Tokens, target: str, request: EditRequest, settings: PhotoSettings, maps: bool
) -> Controls:
    if settings.controller == "mutual":
        if request.weights or request.local or maps:
            raise UserError("weights, local words and attention maps belong to the controller p2p, not to mutual")
        return Controls((MutualAttention(model),), (), (), source, (tokenize_prompt(model, target),))
    plan = make_schedule(model, settings.steps, strength=settings.share)
    return make_controls(
        model, source.text, target, steps=len(plan), size=cells(model, frame), settings=settings.control,
        swaps=request.swaps, weights=request.weights, blend=request.local, keep_maps=maps,
    )  # fmt: skip


def _sampled(
    model: StableDiffusion, frame: Frame, part: PreparedImage, source: str, target: str, guide: Controls, guidance: float
) -> Tensor:
    """Latents (2, c, h, w) of source and target."""
    told = model.prompts([target], pixel_size(frame))
    blends = () if part.blend is None else (part.blend,)
    edit = part.trajectory.edit(
        told, guidance_scale=guidance, hooks=guide.hooks, latent_edits=(*guide.latent_edits, *blends)
    )
    if part.dynamic is not None:
        rows = part.dynamic.conditionings(model, [source, target], pixel_size(frame))
        edit = replace(edit, conditioning=lambda step, latents: rows[step.index])
    return denoise(model, part.trajectory.start(2), edit, part.trajectory.schedule(model))


def word_sheet(guide: Controls, maps: MapSum, pictures: Sequence[Image.Image], size: tuple[int, int]) -> Image.Image:
    """Where the words of source (upper row) and target looked, over their padded `pictures`, cut to `size` (H, W)."""
    height, width = size
    rows, words = [], []
    for heat, tokens, picture in zip(maps.mean().cpu(), (guide.source, *guide.targets), pictures, strict=True):
        words.append([word for word in tokens.words if word.text[-1] not in PUNCTUATION and word.text not in FUNCTION_WORDS])
        marked = [overlay(picture, heat[..., list(word.places)].sum(-1)) for word in words[-1]]
        rows.append([one.crop((0, 0, width, height)) for one in marked])
    pairs = zip_longest(*([word.text for word in row] for row in words), fillvalue="–")
    columns = [" / ".join(dict.fromkeys(pair)) for pair in pairs]
    return grid(rows, columns=columns, labels=["source", "target"], title="Where each word looks")
