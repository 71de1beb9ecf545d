"""`personalize edit PHOTO`: one photo, what it is to show instead, and what came of it in a folder."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from personalize.controls import ControlSettings
from personalize.editor import Editor, strangers
from personalize.errors import UserError
from personalize.files import write_folder
from personalize.images import load_image, psnr, to_pixels
from personalize.null_text import NullText
from personalize.photo import Edited, PhotoSettings, Wish
from personalize.pictures import png

if TYPE_CHECKING:
    from personalize.photo_options import PhotoConfig

OURS = ("edited.png", "before-after.png", "attention.png", "edit.json")
KEPT = "trajectories"


def run(config: PhotoConfig) -> Path:
    """Edit, write the pictures and edit.json, and say how long it took."""
    swaps = [pair(text) for text in config.swap]
    local = [pair(text if "=" in text else f"{text}={text}") for text in config.local]
    wish = Wish(config.target, swaps, dict(weight(text) for text in config.weight), local)
    settings = PhotoSettings(
        config.inversion, config.num_inference_steps, guidance_scale=config.guidance_scale, seed=config.seed,
        null_text=NullText(config.null_text_iterations, config.null_text_rate, config.null_text_tolerance),
        control=ControlSettings(
            config.mode, config.cross_replace_steps, config.self_replace_steps, bind_adjectives=config.bind_adjectives
        ),
        resolution=config.resolution,
    )  # fmt: skip
    photo = load_image(config.photo)
    editor = Editor.configured(config, config.adapter)
    found = editor.photo(
        photo, config.source, wish, settings, folder=config.trajectory, attention=config.attention_maps,
        cache=config.output_dir / KEPT,
    )  # fmt: skip
    files = {"edited.png": png(found.image), "before-after.png": png(found.sheet)}
    if found.attention is not None:
        files["attention.png"] = png(found.attention)
    kept = psnr(to_pixels(found.reconstruction), to_pixels(photo))
    files["edit.json"] = json.dumps(summary(config.source, wish, settings, found, kept), indent=1).encode()
    write_folder(config.output_dir, files, keep=strangers(config.output_dir, OURS))
    for note in found.notes:
        print(f"Note: {note}.")
    print(f"“{found.target}”: {found.seconds:.1f} s, reconstruction {kept:.1f} dB; edited.png in {config.output_dir}")
    return config.output_dir


def pair(text: str) -> tuple[str, str]:
    """ "cat=dog" → ("cat", "dog")."""
    old, _, new = (part.strip() for part in text.partition("="))
    if not old or not new:
        raise UserError(f"{text!r}: write old=new, for example cat=dog")
    return old, new


def weight(text: str) -> tuple[str, float]:
    """ "fluffy=3" → ("fluffy", 3.0)."""
    word, _, factor = text.rpartition("=")
    try:
        return word.strip(), float(factor)
    except ValueError:
        raise UserError(f"{text!r}: write word=factor, for example fluffy=3") from None


def summary(source: str, wish: Wish, settings: PhotoSettings, found: Edited, kept: float) -> dict[str, object]:
    """The contents of edit.json."""
    return {
        "source": source, "target": found.target, "weights": dict(wish.weights), "local": list(wish.local),
        "settings": asdict(settings), "trajectory": found.trajectory.key, "reconstruction_db": round(kept, 2),
        "seconds": round(found.seconds, 2), "notes": found.notes,
    }  # fmt: skip
