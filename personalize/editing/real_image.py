"""Edit a photo by text: invert it, then sample it again together with a second row that has the target prompt.

1.  The photo is encoded and inverted to a trajectory (`sampling.inversion`).
2.  Source and target are sampled side by side as rows of one batch. Prompt-to-Prompt or mutual self-attention gives
    the target the source's attention.
3.  The target is decoded.

Optional: dynamic prompts, which fit the nouns' embeddings so that each attends to its own object, and uniform
attention maps, which keep what the edit does not change.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from personalize.adapters.adapter import Adapter
from personalize.adapters.apply import applied
from personalize.editing.dynamic_prompt_learning.fit import DynamicPrompt
from personalize.editing.dynamic_prompt_learning.leakage import (
    AttentionReport,
    NounRegions,
    fit_dynamic_prompt,
    mean_noun_maps,
    noun_map_sheet,
    report_attention,
)
from personalize.editing.dynamic_prompt_learning.noun_groups import noun_groups
from personalize.editing.mutual_self_attention import MutualAttention
from personalize.editing.prompt_to_prompt.alignment import FUNCTION_WORDS
from personalize.editing.prompt_to_prompt.control import Controls, make_controls
from personalize.editing.real_image_settings import PHOTO_DEFAULTS, EditRequest, PhotoSettings
from personalize.editing.uniform_attention import UniformBlend, UniformSettings, auxiliary_estimates
from personalize.errors import UserError
from personalize.io.figures import grid, overlay, pasted
from personalize.io.images import to_image
from personalize.models.attention_maps import InversionMaps, MapSum
from personalize.models.image_processor import PaddedImage, Picture, as_image
from personalize.models.map_filters import normalised
from personalize.models.prompts import Tokens, tokenize_prompt
from personalize.models.stable_diffusion import StableDiffusion
from personalize.sampling.denoise import denoise
from personalize.sampling.inversion import invert
from personalize.sampling.schedule import make_schedule
from personalize.sampling.trajectory import Trajectory

if TYPE_CHECKING:
    from personalize.editing.real_image_settings import EditRequest, PhotoSettings

PUNCTUATION = ".,;:!?'’-()"  # left out of the sheet of attention maps


@dataclass(frozen=True)
class EditResult:
    """An edited photo; all images have the photo's size.

    image: the edit.
    reconstruction: the source row: the photo as inverted and sampled again.
    sheet: photo, reconstruction and edit side by side.
    attention: a sheet with the attention map of each word, if asked for.
    target: the target prompt.
    latents: (2, c, h, w), source and target; (1, c, h, w) if the target prompt is the source prompt.
    trajectory: the inversion.
    seconds: duration of the whole edit.
    notes: one-line remarks for the user.
    nouns: a sheet with the attention map of each noun before and after dynamic prompts fitted it.
    masks: a sheet with the regions that uniform maps allowed to change, by step.
    region: the union of these regions, boolean (h, w).
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
    """Edit a photo by text.

    Args:
        source: a prompt that describes the photo.
        request: the edit. If its target prompt has the tokens of `source` and no weight other than 1, the result is the
            reconstruction, with a note.
        adapter: an adapter that is applied during the edit; prompts may contain its tokens.
        folder, cache: where the trajectory is written, or read from if it is there; see `invert`.
        attention: also make sheets of attention maps.

    Raises:
        UserError: `EditRequest`, `invert` or `make_controls` refuses its arguments; then nothing is written except the
            trajectory.
    """
    began = time.perf_counter()
    frame = PaddedImage.of(model, as_image(picture), settings.resolution)
    with applied(model, adapter):
        tokens = tokenize_prompt(model, source)
        target = request.prompt(tokens)
        same = tokenize_prompt(model, target).ids == tokens.ids and all(one == 1 for one in request.weights.values())
        control = None if same else _controls(model, frame, tokens, target, request, settings, attention)
        prepared = prepare_image(model, frame, source, request, settings, folder, cache, plain=same)
        scale = settings.guidance(model.name)
        latents = prepared.trajectory.replay(model, scale) if control is None else _sampled(
            model, frame, prepared, source, target, control, scale
        )  # fmt: skip
        nouns = None if prepared.dynamic is None or not attention else dynamic_noun_sheet(model, frame, prepared)
    pixels = model.decode(latents).cpu()
    pictures = [frame.to_picture(row[None]) for row in pixels]
    region = None if prepared.blend is None else prepared.blend.edited_region()
    if request.strict and region is not None:
        pictures[-1] = pasted(pictures[-1], frame.picture, frame.mask_to_picture(region), frame.factor)
    row = [frame.picture, *pictures] if len(pictures) == 2 else [frame.picture, *pictures * 2]
    sheet = grid([row], columns=("photo", "reconstruction", "edit"), title=f"{target} (was: {source})", cell=256)
    maps = None
    if control is not None and attention and control.maps is not None:
        maps = word_sheet(control, control.maps, [to_image(one) for one in pixels], frame.size)
    notes = ("the target says what the source says: this is the reconstruction",) if control is None else ()
    notes = (*notes, *(prepared.report.notes if prepared.report else ()))
    masks = None if prepared.blend is None else mask_sheet(frame, prepared.blend)
    seconds = time.perf_counter() - began
    return EditResult(row[-1], row[1], sheet, maps, target, latents, prepared.trajectory, seconds, notes, nouns, masks,
                      region)  # fmt: skip


def _controls(
    model: StableDiffusion, frame: PaddedImage, source: Tokens, target: str, request: EditRequest,
    settings: PhotoSettings, maps: bool,
) -> Controls:  # fmt: skip
    """The attention hooks and latent edits of the chosen controller; `maps`: also collect attention maps."""
    if settings.controller == "mutual":
        if request.weights or request.local or maps:
            raise UserError("weights, local words and attention maps belong to the controller p2p, not to mutual")
        return Controls((MutualAttention(model),), (), (), source, (tokenize_prompt(model, target),))
    schedule = make_schedule(model, settings.steps, strength=settings.inverted_share)
    return make_controls(
        model, source.text, target, steps=len(schedule), size=cells(model, frame), settings=settings.control,
        swaps=request.swaps, weights=request.weights, blend=request.local, keep_maps=maps,
    )  # fmt: skip


def _sampled(
    model: StableDiffusion, frame: PaddedImage, prepared: PreparedImage, source: str, target: str, control: Controls,
    guidance: float,
) -> Tensor:  # fmt: skip
    """Sample source and target side by side: clean latents (2, c, h, w)."""
    conditioning = model.prompts([target], pixel_size(frame))
    blends = () if prepared.blend is None else (prepared.blend,)
    edit = prepared.trajectory.edit(
        conditioning, guidance_scale=guidance, hooks=control.hooks, latent_edits=(*control.latent_edits, *blends)
    )
    if prepared.dynamic is not None:
        rows = prepared.dynamic.conditionings(model, [source, target], pixel_size(frame))
        edit = replace(edit, conditioning=lambda step, latents: rows[step.index])
    return denoise(model, prepared.trajectory.start(2), edit, prepared.trajectory.schedule(model))


def word_sheet(control: Controls, maps: MapSum, pictures: Sequence[Image.Image], size: tuple[int, int]) -> Image.Image:
    """The attention map of each word of source (upper row) and target, over their padded `pictures` cut to `size`.

    `size` is (H, W) in pixels.
    """
    height, width = size
    rows, words = [], []
    for heat, tokens, picture in zip(maps.mean().cpu(), (control.source, *control.targets), pictures, strict=True):
        shown = (word for word in tokens.words if word.text[-1] not in PUNCTUATION)
        words.append([word for word in shown if word.text not in FUNCTION_WORDS])
        marked = [overlay(picture, normalised(heat[..., list(word.positions)].sum(-1))) for word in words[-1]]
        rows.append([one.crop((0, 0, width, height)) for one in marked])
    pairs = zip_longest(*([word.text for word in row] for row in words), fillvalue="–")
    columns = [" / ".join(dict.fromkeys(pair)) for pair in pairs]
    return grid(rows, columns=columns, labels=["source", "target"], title="Where each word looks")


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
