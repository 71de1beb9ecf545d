"""What the picture shows, in words: given, read from the file beside it, or asked of a captioning model."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from personalize.errors import UserError
from personalize.images import load_image

_NEUTRAL, _ANY = ("photo", "photograph", "picture", "image"), ("picture", "image")
_PREFIX = re.compile(
    r"(an?|the) (?P<medium>photo|photograph|picture|image|drawing|painting|sketch|render|rendering|icon|sticker|cartoon"
    r"|illustration|sculpture|statue|close-up|portrait) of ",
    re.IGNORECASE,
)


def find_caption(picture: Path, caption: str | None = None, caption_model: str | Path | None = None) -> str:
    """The caption of the file `picture`: `caption` itself, else the `.txt` beside it, else what `caption_model` says.

    Raises:
        UserError: an empty caption or sidecar, none of the three, or a model that cannot be loaded.
    """
    if caption is not None:
        return _worded(caption, "--caption")
    beside = sidecar_caption(picture)
    if beside is not None:
        return _worded(beside, str(picture.with_suffix(".txt")))
    if caption_model is not None:
        return describe(load_image(picture), caption_model)
    raise UserError(
        f"{picture} has no caption: pass --caption 'a photo of …', put the words into {picture.stem}.txt beside it, "
        "or name a BLIP folder with --caption_model"
    )


def sidecar_caption(picture: Path) -> str | None:
    """What the `.txt` beside the file `picture` says, on one line; None if there is none.

    Raises:
        UserError: it is not UTF-8 text.
    """
    sidecar = picture.with_suffix(".txt")
    try:
        return " ".join(sidecar.read_text(encoding="utf-8-sig").split()) if sidecar.is_file() else None
    except UnicodeDecodeError:
        raise UserError(f"{sidecar} is not UTF-8 text: save the caption as UTF-8") from None


def _worded(text: str, where: str) -> str:
    """`text` on one line; UserError if nothing is left."""
    words = " ".join(text.split())
    if not words:
        raise UserError(f"the caption from {where} is empty: say what the picture shows, e.g. 'a photo of a dog'")
    return words


def aligned(prompt: str, caption: str) -> str:
    """`prompt` worded like `caption` at its beginning, so that token positions of the two mean the same.

    A learned source embedding is edited row by row: "a dog" against "a photo of a dog" compares a dog with a photo.
    So "a photo of" and the like is taken from the caption, or left out if the caption has none.  A medium that only
    the prompt names, as in "a drawing of a dog", is an edit and stays.

    References: Zhang et al., "Forgedit", arXiv 2309.10556 (the official code copies "A photo of").
    """
    prompt, own, wanted = prompt.strip(), _PREFIX.match(caption.strip()), _PREFIX.match(prompt.strip())
    if wanted is not None and wanted["medium"].lower() not in (_NEUTRAL if own is None or _neutral(own) else _ANY):
        return prompt
    rest = prompt[wanted.end() :] if wanted else prompt
    return (own[0] if own else "") + rest


def _neutral(prefix: re.Match[str]) -> bool:
    return prefix["medium"].lower() in _NEUTRAL


def describe(image: Image.Image, model: str | Path) -> str:
    """Caption `image` with a BLIP-family model: a transformers folder, or a hub id (`owner/name`).

    The picture goes in at its own size and the model's default generation settings are used, without sampling.

    Raises:
        UserError: the model cannot be loaded, is of another kind, or says nothing.
    """
    import torch

    processor, captioner = _captioner(str(model))
    inputs = processor(images=image, return_tensors="pt")
    with torch.inference_mode():
        ids = captioner.generate(**inputs, do_sample=False)
    return _worded(processor.batch_decode(ids, skip_special_tokens=True)[0], f"--caption_model {model}")


@lru_cache(maxsize=1)  # a catalogue asks for many captions
def _captioner(model: str) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    try:
        captioner = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32).eval()
        return AutoProcessor.from_pretrained(model), captioner
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"--caption_model {model} is no captioning model transformers can load: {reason}") from None
