"""`personalize edit PHOTO`: edit one photo by text and write the pictures into a folder."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from personalize.cli.commands.marks import PictureWriter, details_of
from personalize.cli.places import box
from personalize.cli.redrawing import check_same
from personalize.cli.words import local_words, pair, weight
from personalize.editing.config import ControlSettings, DynamicSettings, UniformSettings
from personalize.editing.defaults import settings_for
from personalize.editing.dynamic_prompt_learning.leakage import NounRegions
from personalize.editing.editor import Editor
from personalize.editing.photo_settings import PhotoSettings
from personalize.editing.real_image import EditResult, report_photo
from personalize.editing.real_image_settings import EditRequest
from personalize.errors import said_if_stopped
from personalize.io.figures import png
from personalize.io.image_files import load_image, notice_transparency
from personalize.io.images import psnr, to_pixels
from personalize.io.json_files import json_bytes
from personalize.io.numbering import add_files
from personalize.io.plain_files import at_home
from personalize.sampling.config import INVERSIONS, NullTextSettings

if TYPE_CHECKING:
    from PIL import Image

    from personalize.cli.edit_options import PhotoConfig

EDITED = "edited.png"


def run(config: PhotoConfig, editor: Editor | None = None) -> Path:
    """Edit the photo, write the pictures and edit.json, and print how long it took; returns the output folder.

    `editor` takes the place of the one that the options describe, if that is loaded already.
    """
    load_image(config.photo)  # a mistake in the path is found before the base model is loaded
    cache = config.output_dir / INVERSIONS
    with said_if_stopped(lambda: _stopped(cache)):
        editor = editor or Editor.configured(config, config.adapters)
        return edit_one(config, editor, cache)


def _stopped(cache: Path) -> str:
    """How to go on with an edit that was stopped, for a message."""
    kept = cache.is_dir() and any(cache.iterdir())
    start = f"begins with the inversions in {cache}" if kept else "begins anew"
    return f"stopped: pictures are written when the edit is finished; the same command {start}"


def edit_one(config: PhotoConfig, editor: Editor, cache: Path) -> Path:
    """`run` with a base model that is there already; inversions are kept in `cache`."""
    request, photo = edit_request(config), load_image(config.photo)
    settings = photo_settings(config, editor.model.name)
    if config.report:
        return _report(config, editor, photo, settings, cache)
    notice_transparency(config.photo)
    write = PictureWriter(config, config.photo)
    details = photo_details(config, editor, settings)  # reads files: before the pictures are drawn
    if config.from_ is not None:
        check_same(details, config.from_)
    result = editor.photo(
        photo, config.source, request, settings, folder=config.trajectory, attention=config.attention_maps, cache=cache
    )
    count = len(result.images)
    names = [EDITED] if count == 1 else [f"edited-{number}.png" for number in range(1, count + 1)]
    details |= {"prompt": "; ".join(result.targets), "size": "x".join(map(str, result.images[0].size))}
    files = {name: write(picture, details) for name, picture in zip(names, result.images, strict=True)}
    files["before-after.png"] = write(result.sheet)
    files |= {} if result.attention is None else {"attention.png": write(result.attention)}  # the edits in grey
    of_the_photo = {"nouns.png": result.nouns, "masks.png": result.masks}
    files |= {name: png(picture) for name, picture in of_the_photo.items() if picture is not None}
    similarity = psnr(to_pixels(result.reconstruction), to_pixels(photo))
    used = settings.resolved(editor.model.name, editor.model.resolution)
    files["edit.json"] = json_bytes(summary(config.source, request, used, result, similarity))
    written = add_files(config.output_dir, files)
    names = [written[name] for name in names]
    for note in result.notes:
        print(f"Note: {note}.")
    for name, target in zip(names, result.targets, strict=True):
        print(f"{name}: “{target}”")
    for name, untouched in zip(names, result.untouched, strict=False):
        pixels = photo.width * photo.height
        print(f"{name}: {untouched} of {pixels} pixels ({untouched / pixels:.1%}) are the photo's own")
    print(f"{result.seconds:.1f} s, reconstruction {similarity:.1f} dB; {', '.join(names)} in {config.output_dir}")
    return config.output_dir


def photo_details(config: PhotoConfig, editor: Editor, settings: PhotoSettings) -> dict[str, Any]:
    """What makes the edit again, without the results' prompts and size; see `details_of`."""
    files = {"photo": config.photo}
    regions = {f"region {noun}": where for noun, where in map(pair, config.region)}
    places = {"mask": config.mask, "background_mask": config.background_mask, **regions}
    files |= {name: at_home(where) for name, where in places.items()
              if where not in (None, "auto", "none") and box(where) is None}  # fmt: skip
    facts = {"steps": settings.steps, "scheduler": "ddim", "guidance_scale": settings.guidance(editor.model.name)}
    facts |= {"seed": settings.seed}
    return details_of("edit PHOTO", config, editor, config.adapters, files=files, **facts)


def edit_request(config: PhotoConfig) -> EditRequest:
    """What the options ask to be changed."""
    swaps = [pair(text) for text in config.swap]
    local = [local_words(text) for text in config.local]
    mask = None if config.mask is None else box(config.mask) or Path(config.mask)
    return EditRequest(
        config.target, swaps, dict(weight(text) for text in config.weight), local, mask,
        config.strict_background, _noun_regions(config),
    )  # fmt: skip


def _report(config: PhotoConfig, editor: Editor, photo: Image.Image, settings: PhotoSettings, cache: Path) -> Path:
    """Print whether dynamic prompt learning is needed, and draw the attention of the nouns."""
    report, sheet = report_photo(
        editor.model, photo, config.source, _noun_regions(config), settings, adapter=editor.adapter, cache=cache
    )
    names = add_files(config.output_dir, {"nouns.png": png(sheet)})
    print(*report.sentences(), f"{names['nouns.png']} in {config.output_dir}", sep="\n")
    return config.output_dir


def photo_settings(config: PhotoConfig, base: str) -> PhotoSettings:
    """The settings that the options give; what they leave open is chosen for the base model of the name `base`."""
    null_text = settings_for(
        NullTextSettings, base, iterations=config.null_text_iterations, rate=config.null_text_rate,
        tolerance=config.null_text_tolerance, gradient_checkpointing=config.gradient_checkpointing,
    )  # fmt: skip
    dynamic = settings_for(
        DynamicSettings, base, updates=config.dpl_updates, balancing=config.dpl_balancing, disjoint=config.dpl_disjoint,
        background=config.dpl_background, words_only=config.dpl_words_only,
        gradient_checkpointing=config.gradient_checkpointing,
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
    """Settings of uniform maps, if they are asked for; the source's row is blended only with mutual self-attention."""
    if not config.uniform:
        return None
    return UniformSettings(
        config.uniform_until, config.uniform_quantile, blend_source=config.controller == "mutual",
        auxiliary=config.uniform_auxiliary,
    )  # fmt: skip


def _noun_regions(config: PhotoConfig) -> NounRegions:
    """What the options say about the photo's nouns, for dynamic prompt learning."""
    regions = {noun: box(where) or at_home(where) for noun, where in map(pair, config.region)}
    plain = config.background_mask in ("auto", "none")
    return NounRegions(config.nouns, config.background_mask if plain else Path(config.background_mask), regions)


def summary(
    source: str, request: EditRequest, settings: PhotoSettings, result: EditResult, similarity: float
) -> dict[str, object]:
    """The contents of edit.json; `settings` are the resolved ones, which say what was used where none was given."""
    return {
        "source": source, "target": result.target, "targets": list(result.targets), "weights": dict(request.weights),
        "local": list(request.local), "mask": request.mask.name if isinstance(request.mask, Path) else request.mask,
        "untouched_pixels": list(result.untouched),
        "settings": asdict(settings), "trajectory": result.trajectory.key, "reconstruction_db": round(similarity, 2),
        "seconds": round(result.seconds, 2), "notes": result.notes,
    }  # fmt: skip
