"""What the picture shows, in words: given, read from the file beside it, or asked of a captioning model."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from personalize.errors import UserError
from personalize.images import load_image


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


def describe(image: Image.Image, model: str | Path) -> str:
    """Caption `image` with a BLIP-family model: a transformers folder, or a hub id (`owner/name`).

    The picture goes in at its own size and the model's default generation settings are used, without sampling.

    Raises:
        UserError: the model cannot be loaded, is of another kind, or says nothing.
    """
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(model)
        captioner = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32).eval()
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"--caption_model {model} is no captioning model transformers can load: {reason}") from None
    inputs = processor(images=image, return_tensors="pt")
    with torch.inference_mode():
        ids = captioner.generate(**inputs, do_sample=False)  # pyright: ignore[reportAttributeAccessIssue]
    return _worded(processor.batch_decode(ids, skip_special_tokens=True)[0], f"--caption_model {model}")
