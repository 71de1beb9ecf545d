"""Edit a photo by text: invert it, then sample it again together with rows that have the target prompts.

1.  The photo is brought to the base's size, encoded and inverted to a trajectory (`sampling.inversion`).
2.  Source and targets are sampled side by side as rows of one batch. Prompt-to-Prompt (`prompt_to_prompt.control`) or
    mutual self-attention (`mutual_self_attention`) gives the targets the source's attention.
3.  The targets are decoded and brought back to the photo's size. Outside a region that the user gave, as a mask or by
    words, the photo's own pixels are kept (`region`).

Optional: dynamic prompts, which fit the nouns' embeddings so that each attends to its own object
(`dynamic_prompt_learning`), and uniform attention maps, which keep what the edit does not change
(`uniform_attention`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from personalize.adapters.adapter import Adapter
from personalize.adapters.apply import applied
from personalize.editing.dynamic_prompt_learning.leakage import (
    AttentionReport,
    NounRegions,
    check_regions,
    noun_map_sheet,
    report_attention,
)
from personalize.editing.mutual_self_attention import MutualAttention
from personalize.editing.photo_settings import PHOTO_DEFAULTS, PhotoSettings
from personalize.editing.photo_sheets import edit_sheet, mask_sheet, word_sheet
from personalize.editing.prepared_photo import (
    PreparedImage,
    auxiliary_notes,
    dynamic_noun_sheet,
    pixel_size,
    prepare_image,
)
from personalize.editing.prompt_to_prompt.control import Controls, make_controls
from personalize.editing.prompt_to_prompt.local_blend import LocalBlend, word_blend
from personalize.editing.real_image_settings import EditRequest
from personalize.editing.region import EditRegion, PinnedOutside, keep_photo
from personalize.errors import UserError
from personalize.io.images import to_image
from personalize.models.image_processor import PaddedImage, Picture, as_image
from personalize.models.prompts import Tokens, tokenize_prompt
from personalize.models.stable_diffusion import StableDiffusion
from personalize.sampling.denoise import LatentEdit, denoise
from personalize.sampling.inversion import invert
from personalize.sampling.schedule import make_schedule
from personalize.sampling.trajectory import Trajectory


@dataclass(frozen=True)
class EditResult:
    """An edited photo; all images have the photo's size.

    images: the edit for each target prompt; `image` is the first.
    reconstruction: the source row: the photo as inverted and sampled again.
    sheet: photo, reconstruction and edits side by side.
    attention: a sheet with the attention map of each word, if asked for.
    targets: the target prompts; `target` is the first.
    latents: (1 + targets, c, h, w), source and targets; (1, c, h, w) if all targets are the source prompt.
    trajectory: the inversion.
    seconds: duration of the whole edit.
    notes: one-line remarks for the user.
    nouns: a sheet with the attention map of each noun before and after dynamic prompts fitted it.
    masks: a sheet with the regions that uniform maps allowed to change, by step.
    region: where the first edit was allowed to change the photo, boolean latent cells (h, w); None if everywhere.
    untouched: for each edit the number of pixels that are the photo's own, if they were put back outside of a region.
    """

    images: tuple[Image.Image, ...]
    reconstruction: Image.Image
    sheet: Image.Image
    attention: Image.Image | None
    targets: tuple[str, ...]
    latents: Tensor
    trajectory: Trajectory
    seconds: float
    notes: tuple[str, ...] = ()
    nouns: Image.Image | None = None
    masks: Image.Image | None = None
    region: Tensor | None = None
    untouched: tuple[int, ...] = ()

    @property
    def image(self) -> Image.Image:
        return self.images[0]

    @property
    def target(self) -> str:
        return self.targets[0]


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
    """Edit a photo by text; several target prompts share one inversion and are sampled in one batch.

    Args:
        source: a prompt that describes the photo.
        request: the edit. A target prompt that has the tokens of `source`, if no weight is other than 1, gives the
            reconstruction, with a note.
        adapter: an adapter that is applied during the edit; prompts may contain its tokens.
        folder, cache: where the trajectory is written, or read from if it is there; see `invert`.
        attention: also make sheets of attention maps.

    Raises:
        UserError: `EditRequest`, `invert` or `make_controls` refuses its arguments; then nothing is written except the
            trajectory.
    """
    began = time.perf_counter()
    frame = PaddedImage.of(model, as_image(picture), settings.resolution, enlarge=True)
    region = None if request.mask is None else EditRegion.of(frame, request.mask)
    with applied(model, adapter):
        tokens = tokenize_prompt(model, source)
        targets = request.prompts(tokens)
        unchanged = _unchanged(model, tokens, targets, request)
        plain = all(unchanged)
        control = None if plain else _controls(model, tokens, targets, request, settings, attention)
        prepared = prepare_image(model, frame, source, targets, request, settings, folder, cache, region, plain=plain)
        scale = settings.guidance(model.name)
        if control is None:
            latents = prepared.trajectory.replay(model, scale)
        else:
            latents = _sampled(model, frame, prepared, source, targets, control, scale, region)
            latents[1:][unchanged] = latents[0]  # as when such a target is the only one
        nouns = None if prepared.dynamic is None else dynamic_noun_sheet(model, frame, prepared)
    # one row at a time: of all parts the VAE needs the most memory
    pixels = torch.cat([model.decode(row).cpu() for row in latents.split(1)])
    reconstruction, *edits = [frame.to_picture(row[None]) for row in pixels]
    edits = edits or [reconstruction] * len(targets)
    regions = _regions(frame, request, prepared, control, region, latents, len(edits))
    kept = [keep_photo(edit, frame, own) for edit, own in zip(edits, regions, strict=True)] if regions else []
    edits = [image for image, _ in kept] or edits
    maps = _attention_sheet(control, pixels, frame) if attention else None
    masks = None if prepared.blend is None else mask_sheet(frame, prepared.blend, targets)
    return EditResult(
        images=tuple(edits), reconstruction=reconstruction, targets=tuple(targets), latents=latents,
        sheet=edit_sheet(frame.picture, reconstruction, edits, source, targets), attention=maps, nouns=nouns,
        masks=masks, region=_first_cells(regions, prepared), untouched=tuple(count for _, count in kept),
        trajectory=prepared.trajectory, seconds=time.perf_counter() - began,
        notes=_notes(frame, prepared, unchanged, settings, request, attention)
        + (() if kept else auxiliary_notes(model, frame, prepared.blend, pixels[:1])),
    )  # fmt: skip


def _attention_sheet(control: Controls | None, pixels: Tensor, frame: PaddedImage) -> Image.Image | None:
    """The sheet of the attention maps that `control` recorded; None if it recorded none."""
    if control is None or control.maps is None:
        return None
    return word_sheet(control, control.maps, [to_image(one) for one in pixels], frame.size)


def _unchanged(
    model: StableDiffusion, tokens: Tokens, targets: Sequence[str], request: EditRequest
) -> list[bool]:  # fmt: skip
    """For each target, whether nothing is to change: it has the source's tokens, and no weight is other than 1."""
    weighted = any(one != 1 for one in request.weights.values())
    return [not weighted and tokenize_prompt(model, target).ids == tokens.ids for target in targets]


def _notes(
    frame: PaddedImage, prepared: PreparedImage, unchanged: Sequence[bool], settings: PhotoSettings,
    request: EditRequest, attention: bool,
) -> tuple[str, ...]:  # fmt: skip
    """Remarks for the user: that nothing was to change, the photo's size while edited, silenced words, the report's."""
    same = tuple(
        f"target {number} says what the source says: its picture is the reconstruction"
        for number, one in enumerate(unchanged, 1)
        if one
    )
    if all(unchanged):
        wanted = {"attention maps": attention, "dynamic prompts": settings.dynamic, "uniform maps": settings.uniform}
        left_out = " and ".join(name for name, given in wanted.items() if given)
        without = f", made without {left_out}" if left_out else ""
        same = (f"the target says what the source says: this is the reconstruction{without}",)
    (height, width), (full_width, full_height) = frame.size, frame.picture.size
    scaled = ()
    if (width, height) != (full_width, full_height):
        scaled = (f"edited at {width}×{height} px, the base's own size, and scaled back to {full_width}×{full_height}",)
        if settings.resolution is not None:
            scaled = (f"edited at {width}×{height} px and scaled back to {full_width}×{full_height}",)
    silent = [word for word, factor in request.weights.items() if factor <= 0]
    if silent:  # most of the attention goes to the end and padding tokens, which tell of the whole prompt
        scaled += (f"a weight of 0 or less is for {', '.join(silent)} itself, but the end and padding tokens still "
                   "tell of it: a target without the word removes it",)  # fmt: skip
    if settings.uniform is not None and settings.uniform.blend_source and len(unchanged) > 1 and not all(unchanged):
        scaled += ("with mutual attention and uniform maps the targets share one source, which each of them changes: "
                   "alone they may come out a little different",)  # fmt: skip
    return (*same, *scaled, *(prepared.report.notes if prepared.report else ()))


def _regions(
    frame: PaddedImage, request: EditRequest, prepared: PreparedImage, control: Controls | None,
    region: EditRegion | None, latents: Tensor, count: int,
) -> list[EditRegion]:  # fmt: skip
    """For each of the `count` targets the region outside of which the photo's own pixels come back.

    It is what the user's mask, the words' maps and, if asked for, uniform maps' region, for which a mask stands, have
    in common.  An empty list if there is none of them.
    """
    found = [] if region is None else [[region] * count]
    blends = [edit for edit in control.latent_edits if isinstance(edit, LocalBlend)] if control is not None else []
    cells = [blend.mask((int(latents.shape[-2]), int(latents.shape[-1])))[1:, 0].cpu() for blend in blends]
    if request.strict and prepared.blend is not None and region is None:
        cells.append(prepared.blend.edited_regions())
    found += [[EditRegion.of_cells(frame, one) for one in masks] for masks in cells]
    return [reduce(EditRegion.__and__, own) for own in zip(*found, strict=True)]


def _first_cells(regions: Sequence[EditRegion], prepared: PreparedImage) -> Tensor | None:
    """Where the first edit may change the photo, latent cells (h, w); also where its pixels do not come back."""
    if regions:
        return regions[0].cells
    return prepared.blend.edited_regions()[0] if prepared.blend is not None and prepared.blend.masks else None


def _controls(
    model: StableDiffusion, source: Tokens, targets: Sequence[str], request: EditRequest, settings: PhotoSettings,
    maps: bool,
) -> Controls:  # fmt: skip
    """The attention hooks and latent edits of the chosen controller; `maps`: also collect attention maps."""
    steps = len(make_schedule(model, settings.steps, strength=settings.inverted_share))
    if settings.controller == "p2p":
        return make_controls(
            model, source.text, targets, steps=steps, settings=settings.control, swaps=request.swaps,
            weights=request.weights, blend=request.local, keep_maps=maps,
        )  # fmt: skip
    if request.weights or maps:
        raise UserError("weights and attention maps belong to the controller p2p, not to mutual")
    tokens = tuple(tokenize_prompt(model, target) for target in targets)
    if not request.local:
        return Controls((MutualAttention(model),), (), (), source, tokens)
    # the source row has the empty prompt, so that the targets' words alone say where
    for word in (old for old, new in request.local if old == new and source.has(old)):
        if not any(one.has(word) for one in tokens):
            raise UserError(f"{word!r} is no word of the target, whose words alone the controller mutual can look for: "
                            f"say which has taken its place, such as {word}={tokens[0].words[-1].text}")  # fmt: skip
    threshold, begin = settings.control.blend_threshold, round(settings.control.blend_start * steps)
    store, blend = word_blend(model, None, tokens, request.local, threshold, begin)
    return Controls((MutualAttention(model), store), (blend,), (), source, tokens, store)


def _sampled(
    model: StableDiffusion, frame: PaddedImage, prepared: PreparedImage, source: str, targets: Sequence[str],
    control: Controls, guidance: float, region: EditRegion | None,
) -> Tensor:  # fmt: skip
    """Sample source and targets side by side: clean latents (1 + targets, c, h, w)."""
    length = prepared.trajectory.conditioning.embeds.shape[1]
    conditioning = model.padded(model.prompts(targets, pixel_size(frame)), length)
    more: list[LatentEdit] = [*control.latent_edits]
    more += [] if prepared.blend is None else [prepared.blend]
    more += [] if region is None else [PinnedOutside(region.cells)]
    edit = prepared.trajectory.edit(
        conditioning, guidance_scale=guidance, hooks=control.hooks, latent_edits=tuple(more)
    )
    if prepared.dynamic is not None:
        rows = prepared.dynamic.conditionings(model, [source, *targets], pixel_size(frame))
        edit = replace(edit, conditioning=lambda step, latents: rows[step.index])
        if prepared.trajectory.method == "negative":  # its null row is the source's own, or guidance would not cancel
            edit = replace(edit, negative=lambda step, latents: rows[step.index][:1])
    trajectory = prepared.trajectory
    return denoise(model, trajectory.start(1 + len(targets)), edit, trajectory.schedule(model))


@torch.no_grad()
def report_photo(
    model: StableDiffusion, picture: Picture, source: str, regions: NounRegions, settings: PhotoSettings, *,
    adapter: Adapter | None = None, cache: str | Path | None = None,
) -> tuple[AttentionReport, Image.Image]:  # fmt: skip
    """Report whether a photo needs dynamic prompts, with a sheet of its nouns' attention maps; nothing is edited."""
    frame = PaddedImage.of(model, as_image(picture), settings.resolution, enlarge=True)
    with applied(model, adapter):
        check_regions(model, frame, source, regions)
        trajectory = invert(model, frame.pixels, source, steps=settings.steps, cache=cache)
        report = report_attention(model, frame, trajectory, source, regions)
    return report, noun_map_sheet(frame, report.groups, {"": report.maps})
