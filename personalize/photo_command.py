"""`personalize edit PHOTO`: one photo, what it is to show instead, and what came of it in a folder."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from personalize.calibrated import settings_for
from personalize.controls import ControlSettings
from personalize.dynamic_prompts import DynamicSettings
from personalize.editor import Editor
from personalize.errors import UserError
from personalize.files import unowned_files, write_folder
from personalize.images import load_image, psnr, to_pixels
from personalize.localization import Box, NounRegions
from personalize.null_text import NullTextSettings
from personalize.photo import EditRequest, EditResult, PhotoSettings
from personalize.photo_parts import report_photo
from personalize.pictures import png
from personalize.uniform import UniformSettings

if TYPE_CHECKING:
    from PIL import Image

    from personalize.photo_options import PhotoConfig

OURS = ("edited.png", "before-after.png", "attention.png", "nouns.png", "masks.png", "edit.json")
KEPT = "trajectories"


def run(config: PhotoConfig) -> Path:
    """Edit, write the pictures and edit.json, and say how long it took."""
    swaps = [pair(text) for text in config.swap]
    local = [pair(text if "=" in text else f"{text}={text}") for text in config.local]
    request = EditRequest(
        config.target, swaps, dict(weight(text) for text in config.weight), local, config.mask,
        config.strict_background, _things(config),
    )  # fmt: skip
    photo = load_image(config.photo)
    editor = Editor.configured(config, config.adapter)
    settings = _settings(config, editor.model.name)
    if config.report:
        return _report(config, editor, photo, settings)
    found = editor.photo(
        photo, config.source, request, settings, folder=config.trajectory, attention=config.attention_maps,
        cache=config.output_dir / KEPT,
    )  # fmt: skip
    files = {"edited.png": png(found.image), "before-after.png": png(found.sheet)}
    drawn = {"attention.png": found.attention, "nouns.png": found.nouns, "masks.png": found.masks}
    files |= {name: png(picture) for name, picture in drawn.items() if picture is not None}
    kept = psnr(to_pixels(found.reconstruction), to_pixels(photo))
    files["edit.json"] = json.dumps(summary(config.source, request, settings, found, kept), indent=1).encode()
    write_folder(config.output_dir, files, keep=unowned_files(config.output_dir, OURS))
    for note in found.notes:
        print(f"Note: {note}.")
    print(f"“{found.target}”: {found.seconds:.1f} s, reconstruction {kept:.1f} dB; edited.png in {config.output_dir}")
    return config.output_dir


def _report(config: PhotoConfig, editor: Editor, photo: Image.Image, settings: PhotoSettings) -> Path:
    """Say whether dynamic prompts are needed, and draw where the nouns look."""
    found, sheet = report_photo(
        editor.model, photo, config.source, _things(config), settings, adapter=editor.adapter,
        cache=config.output_dir / KEPT,
    )  # fmt: skip
    write_folder(config.output_dir, {"nouns.png": png(sheet)}, keep=unowned_files(config.output_dir, ("nouns.png",)))
    print(*found.sentences(), f"nouns.png in {config.output_dir}", sep="\n")
    return config.output_dir


def _settings(config: PhotoConfig, base: str) -> PhotoSettings:
    """As the options say; where they say nothing, as suits the base of that name."""
    null_text = settings_for(
        NullTextSettings, base, iterations=config.null_text_iterations, rate=config.null_text_rate,
        tolerance=config.null_text_tolerance,
    )  # fmt: skip
    dynamic = settings_for(
        DynamicSettings, base, updates=config.dpl_updates, balancing=config.dpl_balancing, disjoint=config.dpl_disjoint,
        background=config.dpl_background, words_only=config.dpl_words_only,
    )  # fmt: skip
    return PhotoSettings(
        config.inversion, config.num_inference_steps, guidance_scale=config.guidance_scale, seed=config.seed,
        fixed_point=config.fixed_point_iterations, null_text=null_text, controller=config.controller,
        dynamic=dynamic if config.dpl else None, uniform=_uniform(config), resolution=config.resolution,
        control=ControlSettings(
            config.mode, config.cross_replace_steps, config.self_replace_steps, bind_adjectives=config.bind_adjectives
        ),
    )  # fmt: skip


def _uniform(config: PhotoConfig) -> UniformSettings | None:
    """The source is blended with mutual attention alone, as published."""
    if not config.uniform:
        if config.mask or config.strict_background:
            raise UserError("--mask and --strict_background belong to --uniform: give that too")
        return None
    return UniformSettings(
        config.uniform_until, config.uniform_quantile, blend_source=config.controller == "mutual",
        auxiliary=config.uniform_auxiliary,
    )  # fmt: skip


def _things(config: PhotoConfig) -> NounRegions:
    regions = {noun: box(where) or Path(where) for noun, where in map(pair, config.region)}
    plain = config.background_mask in ("auto", "none")
    return NounRegions(config.nouns, config.background_mask if plain else Path(config.background_mask), regions)


def box(text: str) -> Box | None:
    """ "10,20,100,80" → (10.0, 20.0, 100.0, 80.0); None for what is no list of four numbers."""
    try:
        left, top, right, bottom = (float(part) for part in text.split(","))
    except ValueError:
        return None
    return left, top, right, bottom


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


def summary(source: str, request: EditRequest, settings: PhotoSettings, found: EditResult, kept: float) -> dict[str, object]:
    """The contents of edit.json."""
    return {
        "source": source, "target": found.target, "weights": dict(request.weights), "local": list(request.local),
        "settings": asdict(settings), "trajectory": found.trajectory.key, "reconstruction_db": round(kept, 2),
        "seconds": round(found.seconds, 2), "notes": found.notes,
    }  # fmt: skip
