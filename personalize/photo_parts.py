"""What is computed from a photo before its edit is sampled: inversion, dynamic prompts, auxiliary reconstruction."""

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
from personalize.frames import PaddedImage, Picture, as_image
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
    """A photo that is ready to be edited.

    report: where its nouns attend, if they are made dynamic; dynamic: their fitted embeddings.
    blend: the auxiliary reconstruction, if uniform attention maps are used.
    """

    trajectory: Trajectory
    report: AttentionReport | None = None
    dynamic: DynamicPrompt | None = None
    blend: UniformBlend | None = None


def prepare_image(
    model: StableDiffusion, frame: PaddedImage, source: str, request: EditRequest, settings: PhotoSettings,
    folder: str | Path | None, cache: str | Path | None, *, plain: bool,
) -> PreparedImage:  # fmt: skip
    """Invert a photo and, unless `plain`, fit its dynamic prompt and sample its auxiliary reconstruction."""
    dynamic, uniform = (None, None) if plain else (settings.dynamic, settings.uniform)
    mask = None if request.mask is None else frame.mask_to_cells(as_image(request.mask))
    if dynamic is not None:
        noun_groups(model, source, request.regions.nouns)  # raises before anything is inverted
    maps = InversionMaps(model, cells(model, frame)) if dynamic else None
    scale, null_text = settings.guidance(model.name), settings.null_text_settings(model.name)
    joint = dynamic is not None and settings.inversion == "null-text"  # null embeddings are fitted with the nouns
    trajectory = invert(
        model, frame.pixels, "" if settings.controller == "mutual" else source,
        "ddim" if joint else settings.inversion, steps=settings.steps, strength=settings.inverted_share,
        seed=settings.seed, null_text=null_text, fixed_point=settings.fixed_point, folder=folder, cache=cache,
        hooks=(maps,) if maps else (),
        guidance_scale=scale if settings.inversion == "null-text" else None,
    )  # fmt: skip
    blend = None if uniform is None else blend_of(model, frame, trajectory, uniform, mask)
    if dynamic is None:
        return PreparedImage(trajectory, blend=blend)
    report = report_attention(model, frame, trajectory, source, request.regions, maps)
    rows, trajectory = fit_dynamic_prompt(
        model, trajectory, source, report, dynamic, size=pixel_size(frame), guidance_scale=scale,
        null_text=null_text if joint else None, cache=cache,
    )  # fmt: skip
    return PreparedImage(trajectory, report, rows, blend)


def blend_of(
    model: StableDiffusion, frame: PaddedImage, trajectory: Trajectory, settings: UniformSettings, mask: Tensor | None
) -> UniformBlend:
    """The latent edit of uniform maps, with the auxiliary reconstruction of the photo; `mask` boolean (h, w)."""
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
    """Report whether a photo needs dynamic prompts, with a sheet of its nouns' attention maps; nothing is edited."""
    frame = PaddedImage.of(model, as_image(picture), settings.resolution)
    with applied(model, adapter):
        maps = InversionMaps(model, cells(model, frame))
        trajectory = invert(model, frame.pixels, source, steps=settings.steps, cache=cache, hooks=(maps,))
        report = report_attention(model, frame, trajectory, source, regions, maps)
    return report, noun_map_sheet(frame.picture, report.groups, {"": report.maps})


def dynamic_noun_sheet(model: StableDiffusion, frame: PaddedImage, prepared: PreparedImage) -> Image.Image:
    """A sheet with the attention map of each noun of the photo before and after dynamic prompts fitted it."""
    assert prepared.report is not None and prepared.dynamic is not None
    dynamic = prepared.dynamic.conditionings(model, [prepared.dynamic.prompt], pixel_size(frame))
    stages = {"before": [prepared.trajectory.conditioning] * len(dynamic), "after": dynamic}
    groups, trajectory = prepared.report.groups, prepared.trajectory
    maps = {name: mean_noun_maps(model, trajectory, groups, one) for name, one in stages.items()}
    return noun_map_sheet(frame.picture, groups, maps)


def mask_sheet(frame: PaddedImage, blend: UniformBlend) -> Image.Image:
    """A sheet of the photo in which only what may change is not faded: at each blended step, and at any of them."""
    masks = {f"t {start:g}": mask[0].any(0) for start, mask in blend.masks.items()} | {"any": blend.edited_region()}
    faded = Image.blend(frame.picture, Image.new("RGB", frame.picture.size, "white"), 0.85)
    pictures = [Image.composite(frame.picture, faded, frame.mask_to_picture(mask)) for mask in masks.values()]
    return grid([pictures], columns=list(masks), title="Where the photo may change", cell=96)


def cells(model: StableDiffusion, frame: PaddedImage) -> tuple[int, int]:
    """Height and width of the padded photo in latent cells."""
    height, width = (side // model.factor for side in pixel_size(frame))
    return height, width


def pixel_size(frame: PaddedImage) -> tuple[int, int]:
    """Height and width of the padded photo in pixels."""
    return int(frame.pixels.shape[-2]), int(frame.pixels.shape[-1])
