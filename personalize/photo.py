"""Edit a photo by text: invert it, then sample it again together with a second row that has the target prompt.

1.  The photo is encoded and inverted to a trajectory (`personalize.inversion`).
2.  Source and target are sampled side by side as rows of one batch. Prompt-to-Prompt (`personalize.controls`) or mutual
    self-attention (`personalize.mutual`) gives the target the source's attention.
3.  The target is decoded.

Optional: dynamic prompts, which fit the nouns' embeddings so that each attends to its own object
(`personalize.localization`), and uniform attention maps, which keep what the edit does not change
(`personalize.uniform`).
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
from personalize.frames import PaddedImage, Picture, as_image
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

PUNCTUATION = ".,;:!?'’-()"  # left out of the sheet of attention maps


@dataclass(frozen=True)
class EditRequest:
    """The requested edit of a photo: a target prompt, words to swap in the source prompt, or weights of words alone.

    target: the target prompt, or "" if `swaps` or `weights` describe the edit.
    swaps: (old, new) words or phrases of the source prompt.
    weights: factors on the attention to words of the target prompt.
    local: (word of the source, word of the target): the photo may change only where these words attend.
    mask: for uniform maps: an image, white where the photo may change; it replaces the mask that they compute.
    strict: for uniform maps: outside the mask, copy the photo's own pixels into the result.
    regions: for dynamic prompts: the nouns, and where each belongs.
    """

    target: str = ""
    swaps: Sequence[tuple[str, str]] = ()
    weights: Mapping[str, float] = field(default_factory=dict)
    local: Sequence[tuple[str, str]] = ()
    mask: Picture | None = None
    strict: bool = False
    regions: NounRegions = AUTO_REGIONS

    def prompt(self, source: Tokens) -> str:
        """The target prompt.

        Raises UserError if there is no edit, both a target and swaps, or a swapped word that the source lacks.
        """
        if self.target.strip() and self.swaps:
            raise UserError("a target and words to swap are two ways to say one thing: give one of them")
        if not self.target.strip() and not self.swaps and not self.weights:
            raise UserError("nothing is to change: give a target prompt, words to swap, or weights of words")
        return self.target.strip() or swap_words(source, self.swaps)


@dataclass(frozen=True)
class PhotoSettings:
    """How a photo is inverted and edited; see `invert` and `ControlSettings`. UserError for a wrong combination."""

    inversion: str = "direct"
    steps: int = 50
    strength: float | None = None
    """Share of the steps that is inverted and sampled, at the clean end; by default 1, with ddpm 0.64."""
    guidance_scale: float | None = None
    """Guidance scale of the edit; by default 7.5, with ddpm 15; on the embedded model 4, with ddpm 6."""
    seed: int = 0
    null_text: NullTextSettings | None = None
    """How null embeddings are fitted; by default as in `personalize.calibrated` for the base model."""
    fixed_point: int = 0
    """Fixed-point iterations at each inversion step."""
    controller: Literal["p2p", "mutual"] = "p2p"
    """Prompt-to-Prompt, or mutual self-attention; the latter inverts with the empty prompt, as published."""
    control: ControlSettings = ControlSettings()
    dynamic: DynamicSettings | None = None
    """Settings of dynamic prompts, or None for none; only with the controller p2p."""
    uniform: UniformSettings | None = None
    """Settings of uniform attention maps, or None for none."""
    resolution: int | None = None

    def __post_init__(self) -> None:
        if self.controller == "mutual" and self.dynamic is not None:
            raise UserError("mutual attention has no source prompt, so that no noun can be dynamic: use one of them")

    def guidance(self, base: str) -> float:
        """The guidance scale of the edit, for the base model of that name."""
        return calibrated.guidance(base, self.inversion) if self.guidance_scale is None else self.guidance_scale

    def null_text_settings(self, base: str) -> NullTextSettings:
        """How null embeddings are fitted, for the base model of that name."""
        return self.null_text or calibrated.settings_for(NullTextSettings, base)

    @property
    def inverted_share(self) -> float:
        """The share of the steps that is inverted, which depends on the inversion by default."""
        return STRENGTH.get(self.inversion, 1.0) if self.strength is None else self.strength


PHOTO_DEFAULTS = PhotoSettings()


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
        marked = [overlay(picture, heat[..., list(word.positions)].sum(-1)) for word in words[-1]]
        rows.append([one.crop((0, 0, width, height)) for one in marked])
    pairs = zip_longest(*([word.text for word in row] for row in words), fillvalue="–")
    columns = [" / ".join(dict.fromkeys(pair)) for pair in pairs]
    return grid(rows, columns=columns, labels=["source", "target"], title="Where each word looks")
