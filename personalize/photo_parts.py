"""What an edit of a photo is prepared from: its trajectory, nouns that look at their things, an auxiliary picture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from personalize.adapter import Adapter
from personalize.attachment import applied
from personalize.dynamic_prompts import DynamicPrompt
from personalize.errors import UserError
from personalize.frames import Frame, Picture, opened
from personalize.inversion import invert
from personalize.localization import (
    AttentionReport,
    NounRegions,
    fit_dynamic_prompt,
    mean_noun_maps,
    noun_map_sheet,
    report_attention,
)
from personalize.model import StableDiffusion
from personalize.moves import make_schedule
from personalize.noun_groups import noun_groups
from personalize.pictures import grid
from personalize.text_maps import InversionMaps
from personalize.trajectories import Trajectory
from personalize.uniform import UniformBlend, UniformSettings, auxiliary_estimates

if TYPE_CHECKING:
    from personalize.photo import EditRequest, PhotoSettings


@dataclass(frozen=True)
class PreparedImage:
    """What was made of the photo before the edit is sampled."""

    trajectory: Trajectory
    found: AttentionReport | None = None
    dynamic: DynamicPrompt | None = None
    blend: UniformBlend | None = None


def prepare_image(
    model: StableDiffusion, frame: Frame, source: str, request: EditRequest, settings: PhotoSettings,
    folder: str | Path | None, cache: str | Path | None, *, plain: bool,
) -> PreparedImage:  # fmt: skip
    """The photo's trajectory, its dynamic nouns, its auxiliary picture; `plain` leaves the latter two out."""
    dynamic, uniform = (None, None) if plain else (settings.dynamic, settings.uniform)
    mask = None if request.mask is None else frame.mask_to_cells(opened(request.mask))
    if dynamic is not None:
        noun_groups(model, source, request.regions.nouns)  # mistakes are found before anything is inverted
    maps = InversionMaps(model, cells(model, frame)) if dynamic else None
    scale, fit = settings.guidance(model.name), settings.fit(model.name)
    joint = dynamic is not None and settings.inversion == "null-text"  # null embeddings are fitted with the nouns
    trajectory = invert(
        model, frame.pixels, "" if settings.controller == "mutual" else source,
        "ddim" if joint else settings.inversion, steps=settings.steps, strength=settings.share, seed=settings.seed,
        null_text=fit, fixed_point=settings.fixed_point, folder=folder, cache=cache,
        hooks=(maps,) if maps else (),
        guidance_scale=scale if settings.inversion == "null-text" else None,
    )  # fmt: skip
    blend = None if uniform is None else blend_of(model, frame, trajectory, uniform, mask)
    if dynamic is None:
        return PreparedImage(trajectory, blend=blend)
    found = report_attention(model, frame, trajectory, source, request.regions, maps)
    rows, trajectory = fit_dynamic_prompt(
        model, trajectory, source, found, dynamic, size=pixel_size(frame), guidance_scale=scale,
        null_text=fit if joint else None, cache=cache,
    )  # fmt: skip
    return PreparedImage(trajectory, found, rows, blend)


def blend_of(
    model: StableDiffusion, frame: Frame, trajectory: Trajectory, settings: UniformSettings, mask: Tensor | None
) -> UniformBlend:
    down = make_schedule(model, trajectory.about["steps"], strength=trajectory.about["strength"])
    up = make_schedule(model, trajectory.about["steps"], strength=trajectory.about["strength"], inverse=True)
    clean = auxiliary_estimates(model, model.encode(frame.pixels), up, down, settings)
    if not clean:
        raise UserError("no step is below the uniform maps' limit: raise --uniform_until or the number of steps")
    return UniformBlend(clean, settings, mask)


@torch.no_grad()
def report_photo(
    model: StableDiffusion, picture: Picture, source: str, regions: NounRegions, settings: PhotoSettings, *,
    adapter: Adapter | None = None, cache: str | Path | None = None,
) -> tuple[AttentionReport, Image.Image]:  # fmt: skip
    """Whether a photo needs dynamic prompts, and where its nouns look; nothing is edited."""
    frame = Frame.of(model, opened(picture), settings.resolution)
    with applied(model, adapter):
        maps = InversionMaps(model, cells(model, frame))
        trajectory = invert(model, frame.pixels, source, steps=settings.steps, cache=cache, hooks=(maps,))
        found = report_attention(model, frame, trajectory, source, regions, maps)
    return found, noun_map_sheet(frame.picture, found.groups, {"": found.maps})


def dynamic_noun_sheet(model: StableDiffusion, frame: Frame, part: PreparedImage) -> Image.Image:
    assert part.found is not None and part.dynamic is not None
    told = part.dynamic.conditionings(model, [part.dynamic.prompt], pixel_size(frame))
    stages = {"before": [part.trajectory.conditioning] * len(told), "after": told}
    groups, way = part.found.groups, part.trajectory
    maps = {name: mean_noun_maps(model, way, groups, one) for name, one in stages.items()}
    return noun_map_sheet(frame.picture, groups, maps)


def mask_sheet(frame: Frame, blend: UniformBlend) -> Image.Image:
    """What may change at each blended step, and at any of them: shown, the rest faded."""
    masks = {f"t {start:g}": mask[0].any(0) for start, mask in blend.masks.items()} | {"any": blend.edited_region()}
    faded = Image.blend(frame.picture, Image.new("RGB", frame.picture.size, "white"), 0.85)
    shown = [Image.composite(frame.picture, faded, frame.mask_to_picture(mask)) for mask in masks.values()]
    return grid([shown], columns=list(masks), title="Where the photo may change", cell=96)


def cells(model: StableDiffusion, frame: Frame) -> tuple[int, int]:
    height, width = (side // model.factor for side in pixel_size(frame))
    return height, width


def pixel_size(frame: Frame) -> tuple[int, int]:
    return int(frame.pixels.shape[-2]), int(frame.pixels.shape[-1])
