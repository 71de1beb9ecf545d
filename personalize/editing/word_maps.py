"""The cross-attention map of each word of a photo's description, before anything is edited."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from personalize.adapters.adapter import Adapter
from personalize.adapters.apply import applied
from personalize.editing.dynamic_prompt_learning.leakage import record_maps
from personalize.editing.photo_settings import PHOTO_DEFAULTS, PhotoSettings
from personalize.editing.photo_sheets import content_words
from personalize.io.figures import overlay
from personalize.io.images import to_image
from personalize.models.image_processor import PaddedImage, Picture, as_image
from personalize.models.map_filters import normalised
from personalize.models.prompts import tokenize_prompt
from personalize.models.stable_diffusion import StableDiffusion
from personalize.sampling.inversion import invert


@torch.no_grad()
def word_maps(
    model: StableDiffusion, picture: Picture, source: str, settings: PhotoSettings = PHOTO_DEFAULTS, *,
    adapter: Adapter | None = None, cache: str | Path | None = None,
) -> dict[str, Image.Image]:  # fmt: skip
    """For each word of `source` the photo in grey, orange where the word has its cross-attention, all times it is said.

    The maps are the mean over the steps of an inversion and cost one prediction for each of them, besides the inversion
    itself, which is kept in `cache`.  Articles, prepositions and punctuation are left out.
    """
    frame = PaddedImage.of(model, as_image(picture), settings.resolution, enlarge=True)
    height, width = frame.size
    with applied(model, adapter):
        tokens = tokenize_prompt(model, source)
        trajectory = invert(model, frame.pixels, source, steps=settings.steps, cache=cache)
        heat = record_maps(model, trajectory).cross_attention().mean(0)
    photo, places = to_image(frame.pixels), dict[str, list[int]]()
    for word in content_words(tokens):
        places.setdefault(word.text, []).extend(word.positions)
    marked = {text: overlay(photo, normalised(heat[..., own].sum(-1))) for text, own in places.items()}
    return {text: one.crop((0, 0, width, height)) for text, one in marked.items()}
