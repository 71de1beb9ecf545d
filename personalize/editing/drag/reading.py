"""A picture made ready for drags: scaled, encoded, and its self-attention read with one prediction.

All drags of one picture, and all previews, use the same `DragSource`.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

from personalize.adapters.adapter import Adapter
from personalize.adapters.apply import applied
from personalize.editing.drag.attention import AttentionRows, QKVRecorder, self_attention_sites
from personalize.editing.drag.config import DEFAULTS, DragSettings
from personalize.editing.drag.inpaint import inpainting_inputs
from personalize.editing.vector_projection import edit_conditioning
from personalize.errors import UserError
from personalize.models.attention import AttentionSite, attention_sites
from personalize.models.image_processor import PaddedImage, Picture, as_image
from personalize.models.parameterization import noised
from personalize.models.stable_diffusion import Conditioning, StableDiffusion
from personalize.randomness import generator
from personalize.sampling.denoise import Edit, denoise
from personalize.sampling.schedule import Schedule, Transition

READ_AT = 50  # timestep of the prediction; 1, 50, 100 and 200 give masks of equal quality, by trial


@dataclass(frozen=True)
class DragSource:
    """A picture and the attention of its cells, read as `prompt` describes it."""

    frame: PaddedImage
    attention: AttentionRows

    @staticmethod
    def of(
        model: StableDiffusion, picture: Picture, prompt: str | None = None, adapter: Adapter | None = None,
        resolution: int | None = None, settings: DragSettings = DEFAULTS,
    ) -> DragSource:  # fmt: skip
        """Prepare `picture`; the arguments are those of `drag_picture`.  It costs one prediction."""
        frame = PaddedImage.of(model, as_image(picture), resolution)
        with applied(model, adapter, any_base=model.inpainting):  # made of the adapter's base, but never the same
            prompted = conditioning(model, adapter, prompt, (frame.pixels.shape[-2], frame.pixels.shape[-1]))
            attention = read_attention(model, model.encode(frame.pixels), prompted, settings)
        return DragSource(frame, attention)


class SourceCache:
    """Keeps the last `DragSource`, so that previews and drags of one picture encode and read it once."""

    def __init__(self) -> None:
        self._last: tuple[tuple[Any, ...], DragSource] | None = None

    def get(
        self, model: StableDiffusion, picture: Picture, prompt: str | None, adapter: Adapter | None,
        resolution: int | None, settings: DragSettings,
    ) -> DragSource:  # fmt: skip
        """The kept one, if nothing that it depends on has changed; else a new one, which takes its place."""
        image = as_image(picture)
        read = (settings.map_places, settings.map_levels, settings.seed)
        key = (model, adapter, sha256(image.tobytes()).hexdigest(), image.size, prompt, resolution, read)
        if self._last is None or not _same(self._last[0], key):
            self._last = (key, DragSource.of(model, image, prompt, adapter, resolution, settings))
        return self._last[1]


def _same(key: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    return key[0] is other[0] and key[1] is other[1] and key[2:] == other[2:]


@torch.no_grad()
def read_attention(
    model: StableDiffusion, latents: Tensor, conditioning: Conditioning, settings: DragSettings = DEFAULTS
) -> AttentionRows:
    """The self-attention of clean `latents` (1, c, h, w), noised to the timestep 50, at the sites `settings` names.

    Raises:
        UserError: `settings` name no site.
    """
    size, alpha = (latents.shape[-2], latents.shape[-1]), model.alpha(READ_AT)
    sites = read_sites(model, size, settings)
    recorder = QKVRecorder([site.name for site in sites], "qk")
    noise = torch.randn(latents.shape, generator=generator(settings.seed, "drag/read")).to(latents)
    once = Schedule((Transition(READ_AT, READ_AT, READ_AT, alpha, alpha),))
    edit = Edit(conditioning, guidance_scale=1, hooks=(recorder,))
    with inpainting_inputs(model, torch.zeros(size, dtype=torch.bool), latents):
        denoise(model, noised(latents, noise, alpha), edit, once)
    return AttentionRows(recorder.kept, sites, size, model.device)


def read_sites(model: StableDiffusion, size: tuple[int, int], settings: DragSettings) -> list[AttentionSite]:
    """The sites whose attention decides the mask.  UserError if there are none."""
    sites = self_attention_sites(attention_sites(model.unet, size), settings.map_places, settings.map_levels)
    if not sites:
        raise UserError(
            f"no self-attention at places {settings.map_places}, levels {settings.map_levels} of this base: "
            "places are down, mid and up, level 0 is the finest that has any"
        )
    return sites


@torch.no_grad()
def conditioning(
    model: StableDiffusion, adapter: Adapter | None, prompt: str | None, size: tuple[int, int]
) -> Conditioning:
    """The conditioning of a drag: of `prompt`, else the adapter's source embedding or caption, else the empty prompt.

    Call it inside `applied(model, adapter)`, so that the text encoders have the adapter's LoRA and learned tokens.
    """
    caption = "" if adapter is None else str(adapter.info.get("caption", ""))
    prompted = model.prompts([caption if prompt is None else prompt], size)
    learned = adapter.starting_from(prompt=caption).source if adapter is not None and prompt is None else None
    return edit_conditioning(model, learned, prompted, alpha=1.0, beta=0.0)
