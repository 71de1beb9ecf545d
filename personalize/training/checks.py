"""What can be wrong with a trainer's options, found before torch is imported and before anything is drawn."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from personalize.adapters.subjects import check_named, default_prompt, read_subjects, read_trigger
from personalize.errors import Notice, UserError
from personalize.io.image_files import check_image, check_image_path
from personalize.io.image_folders import ImageFolder, read_folder
from personalize.io.output_folder import check_output_folder
from personalize.models.config import check_base_name, check_resolution, notice_unused
from personalize.training.config import check_warmup
from personalize.training.data.captions import find_caption, folder_caption, no_caption
from personalize.training.data.sources import (
    MASK_FILE,
    concepts_picture,
    instance_folders,
    instance_places,
    named_pictures,
)


def check_single_image(config: Any) -> None:
    """Check the options of `single_image`, and print what its folders of pictures hold and leave out.

    Raises:
        UserError: what the options name is not there or cannot be read, or they contradict one another.
    """
    check_run(config)
    check_class_images(config)
    if config.with_prior_preservation and not (config.class_prompt or "").strip():
        raise UserError("with_prior_preservation needs class_prompt: what class pictures show, e.g. 'a photo of a dog'")
    if config.caption is not None and not config.caption.strip():
        raise UserError("the caption from --caption is empty: say what the picture shows, e.g. 'a photo of a dog'")
    if config.caption is not None and config.caption_model is not None:
        warnings.warn(
            "pictures without a caption of their own have that of --caption: nothing comes of --caption_model", Notice,
            stacklevel=2,
        )  # fmt: skip
    without = [name for name in ("standalone", "train_text_encoder") if getattr(config, name)]
    if without and not config.instance_token and config.text_embedding_lr != type(config).text_embedding_lr:
        warnings.warn(
            f"{without[0]} trains no embedding, so that nothing comes of text_embedding_lr", Notice, stacklevel=2
        )
    captions = _check_pictures(config, instance_places(config))
    if config.instance_token is not None and captions:
        _check_trigger(config, captions)


def _check_pictures(config: Any, places: list[Path]) -> list[str]:
    """Check the pictures at `places` with their masks; returns their captions, "" for those generated later."""
    captioned = config.caption is not None or config.caption_model is not None
    masks = [] if config.instance_mask is None or not places else [config.instance_mask]
    for mask in masks:
        if not mask.is_dir():
            check_image_path(mask)
    images = named_pictures(places, config, masks)
    learned, rest, captions = {image.path for image in images}, iter(images), list[str]()
    for place, folder in zip(places, instance_folders(places, captioned=captioned), strict=True):
        own = tuple(next(rest) for image in folder.images if image.path in learned)  # without masks that lie among them
        if place.is_dir():
            folder = replace(folder, images=own)
            _report(folder)
            captions += _check_captions(folder, config, captioned)
        else:
            for image in own:
                check_image(image.path)
                words = folder_caption(image, config.caption_column)
                captions.append(words or find_caption(place, config.caption, config.caption_model, generate=False))
        for mask in (path for image in own for path in image.files.values()):
            check_image(mask)
    if places and config.mask_weight != type(config).mask_weight and not any(MASK_FILE in one.files for one in images):
        warnings.warn("no picture has a mask, so that nothing comes of --mask_weight", Notice, stacklevel=3)
    return captions


def _check_trigger(config: Any, captions: list[str]) -> None:
    """Check --instance_token against the captions that are known; the "" of others are generated later."""
    known = [caption for caption in captions if caption]
    if len(known) < len(captions):
        raise UserError("instance_token must be in every caption, and --caption_model does not know it: use --caption")
    read_trigger(config.instance_token, known)


def check_multi_concept(config: Any) -> None:
    """Check the options of `multi_concept`, with the words of its prompt.

    Raises:
        UserError: what the options name is not there or cannot be read, or they contradict one another.
    """
    check_run(config)
    check_class_images(config)
    if config.mask_weight and not config.masks:
        raise UserError("mask_weight needs masks: name a picture for each concept with --masks")
    if config.masks and config.mask_weight is None and not config.calibration_weight:
        raise UserError("masks have the weight of the calibration, which is 0: give a mask_weight, or leave masks out")
    for picture in (concepts_picture(config), *config.masks):
        check_image(picture)
    subjects = read_subjects(config.concepts, config.modifier_token, config.instance_prompt, config.num_vectors)
    if not subjects:
        raise UserError("name at least one concept, e.g. --concepts '<cat1> cat'")
    if config.masks and len(config.masks) != len(subjects):
        raise UserError(f"{len(subjects)} of --concepts need as many --masks or none, got {len(config.masks)}")
    check_warmup(config, config.max_train_steps)
    check_named(config.instance_prompt or default_prompt(subjects), subjects)


def check_run(config: Any) -> None:
    """Check the base model, the output folder and the checkpoint that a trainer's options name."""
    if config.pretrained_model_name_or_path is not None:
        check_base_name(config.pretrained_model_name_or_path)
    check_resolution(config.resolution, config.pretrained_model_name_or_path)
    start, output = config.resume_from_checkpoint, config.output_dir
    check_output_folder(output)
    check_packages(config)
    _check_judging(config)
    notice_unused(config, {
        "--validation_prompt": (bool(config.validation_prompt), "num_validation_images validation_steps"),
        "--push_to_hub": (config.push_to_hub, "hub_model_id"),
        "--report_to": (config.report_to is not None, "logging_dir"),
        **learning_uses([config], classes=config.with_prior_preservation),
    })  # fmt: skip
    if start == "latest" and not any(output.glob("checkpoint-*")):
        warnings.warn(f"there is no checkpoint in {output} to resume from: training begins anew", Notice, stacklevel=2)
    if start not in (None, "latest") and not any(path.is_dir() for path in (output / start, Path(start))):
        raise UserError(f"no checkpoint at {start}: name a checkpoint-N folder, or 'latest'")


def learning_uses(configs: Sequence[Any], *, classes: bool) -> dict[str, tuple[bool, str]]:
    """For `notice_unused`: options of training that need another one, and whether any of `configs` gives that.

    classes: whether class pictures are used.
    """
    return {
        "--use_ema": (any(one.use_ema for one in configs), "ema_max_decay"),
        "--min_rank": (any(one.min_rank is not None for one in configs), "alpha_rank_scale"),
        "--with_prior_preservation": (classes, "prior_loss_weight"),
    }


def check_packages(config: Any) -> None:
    """UserError unless bitsandbytes is installed, if an option needs it."""
    for name in ("use_8bit_adam", "load_in_4bit"):
        if getattr(config, name, False) and find_spec("bitsandbytes") is None:
            raise UserError(f"{name} needs the package bitsandbytes: pip install bitsandbytes")


def _check_judging(config: Any) -> None:
    """Check the options by which the best weights are found."""
    extra = [name for name in ("clip_model", "identity_model") if getattr(config, name) is not None]
    if extra and not config.keep_best:
        raise UserError(f"--{extra[0]} belongs to --keep_best: add --keep_best, or leave --{extra[0]} out")
    if not config.keep_best:
        return
    if not (config.validation_prompt or "").strip():
        raise UserError(
            "keep_best needs validation_prompt: the edit whose pictures are scored, e.g. 'a dog on a beach'"
        )


def check_class_image_count(count: int) -> None:
    """UserError for a number of class pictures below 1."""
    if count < 1:
        raise UserError(f"num_class_images must be above 0, got {count}; or use --no_with_prior_preservation")


def check_class_images(config: Any) -> None:
    """Check the folder of class pictures, and say which options about class pictures have no effect."""
    if config.with_prior_preservation:
        check_class_image_count(config.num_class_images)
        check_class_source(config)
        if config.class_data_dir is not None:
            _report(read_folder(config.class_data_dir))
        return
    notice_class_options(config)


def notice_class_options(config: Any) -> None:
    """Say which options about class pictures have no effect, where none are used."""
    names = ("class_prompt", "class_data_dir", "class_dataset_name", "class_image_cache")
    if given := [f"--{name}" for name in names if getattr(config, name) is not None]:
        warnings.warn(
            "without --with_prior_preservation no class pictures are used, so that nothing comes of "
            f"{' and '.join(given)}", Notice, stacklevel=2,
        )  # fmt: skip


def check_class_source(options: Any) -> None:
    """UserError if the options name two sources of class pictures, one of which would not be read."""
    if None not in (options.class_data_dir, options.class_dataset_name):
        raise UserError(
            f"class pictures come from one place, got class_data_dir {options.class_data_dir} and class_dataset_name "
            f"{options.class_dataset_name}: leave one out"
        )


def _report(folder: ImageFolder) -> None:
    """Print how many pictures a folder holds, and what was left out; in a launch of processes only by the first."""
    if os.environ.get("RANK", "0") == "0":
        count = len(folder.images)
        print(f"{count} picture{'s' * (count != 1)} in {folder.path}", *folder.remarks(), sep="\n", flush=True)


def _check_captions(folder: ImageFolder, config: Any, captioned: bool) -> list[str]:
    """The captions of a folder, "" if they are generated later; says for how many --caption is not used.

    UserError unless each picture has one.
    """
    own = [folder_caption(image, config.caption_column) for image in folder.images]  # a picture may be in several rows
    missing = [image.path for image, caption in zip(folder.images, own, strict=True) if not caption]
    if missing and not captioned:
        raise no_caption(missing[0], config.caption_column)
    if config.caption is not None and len(missing) < len(own):
        left = f"--caption for the other {len(missing)}" if missing else "--caption is not used"
        warnings.warn(
            f"{len(own) - len(missing)} of {len(own)} pictures in {folder.path} have a caption of their own; {left}",
            Notice, stacklevel=2,
        )  # fmt: skip
    return [caption or config.caption or "" for caption in own]
