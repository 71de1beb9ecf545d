"""Sheets of pictures that show an edit of a photo: before and after, attention of words, where it may change."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

import torch
from PIL import Image

from personalize.editing.prompt_to_prompt.alignment import FUNCTION_WORDS
from personalize.editing.prompt_to_prompt.control import Controls
from personalize.editing.uniform_attention import UniformBlend
from personalize.io.figures import grid, overlay, scaled_to_side
from personalize.models.attention_maps import MapSum
from personalize.models.image_processor import PaddedImage
from personalize.models.map_filters import normalised
from personalize.models.prompts import Tokens, Word

_CELL = 96  # px, side of a picture in the sheet of masks
PUNCTUATION = ".,;:!?'’-()"


def edit_sheet(
    photo: Image.Image, reconstruction: Image.Image, edits: Sequence[Image.Image], source: str, targets: Sequence[str]
) -> Image.Image:  # fmt: skip
    """Photo, reconstruction and every edit side by side."""
    names = ["edit"] if len(edits) == 1 else list(targets)
    title = f"{targets[0]} (was: {source})" if len(edits) == 1 else f"was: {source}"
    return grid([[photo, reconstruction, *edits]], columns=["photo", "reconstruction", *names], title=title, cell=256)


def content_words(tokens: Tokens) -> list[Word]:
    """The words of a prompt without articles, prepositions and punctuation."""
    words = (word for word in tokens.words if word.text[-1] not in PUNCTUATION)
    return [word for word in words if word.text not in FUNCTION_WORDS]


def word_sheet(
    control: Controls, maps: MapSum, pictures: Sequence[Image.Image], size: tuple[int, int]
) -> Image.Image | None:  # fmt: skip
    """The attention map of each word of source (first row) and targets, over their padded `pictures` cut to `size`.

    `size` is (H, W) in pixels.  None if the prompts have no words but articles, prepositions and punctuation.
    """
    height, width = size
    rows, words = [], []
    for heat, tokens, picture in zip(maps.mean().cpu(), (control.source, *control.targets), pictures, strict=True):
        words.append(content_words(tokens))
        marked = [overlay(picture, normalised(heat[..., list(word.positions)].sum(-1))) for word in words[-1]]
        rows.append([one.crop((0, 0, width, height)) for one in marked])
    if not any(words):
        return None
    pairs = zip_longest(*([word.text for word in row] for row in words), fillvalue="–")
    columns = [" / ".join(dict.fromkeys(pair)) for pair in pairs]
    labels = ["source", *["target"] * len(control.targets)]
    return grid(rows, columns=columns, labels=labels, title="Where each word looks")


def mask_sheet(frame: PaddedImage, blend: UniformBlend, targets: Sequence[str]) -> Image.Image:
    """A sheet of the photo in which only what may change is not faded: at each blended step, and at any of them.

    There is a row for each of the `targets`.
    """
    # (steps, targets, h, w), by one read of the device
    steps = torch.stack([mask.any(1) for mask in blend.masks.values()]).cpu()
    small = scaled_to_side(frame.picture, _CELL)
    faded = Image.blend(small, Image.new("RGB", small.size, "white"), 0.85)
    rows = [
        [Image.composite(small, faded, frame.mask_to_picture(mask, small.size)) for mask in (*masks, masks.any(0))]
        for masks in steps.transpose(0, 1)
    ]
    labels = list(targets) if len(rows) > 1 else [""]
    columns = [*(f"t {start:g}" for start in blend.masks), "any"]
    return grid(rows, columns=columns, labels=labels, title="Where the photo may change", cell=_CELL)
