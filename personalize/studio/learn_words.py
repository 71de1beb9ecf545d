"""The tab Learn's fields as the command line of a training."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from personalize.cli import launch
from personalize.errors import UserError
from personalize.formats.adapter_folders import MANIFEST
from personalize.studio.actions import option
from personalize.studio.parts import Studio, drawn_on

ONE, SEVERAL = "One subject", "Several subjects of one picture"
ON_TOP = ("low_memory", "fast", "dreambooth")  # presets that go on top of a base's own
OWN_BASE = "the package's own"


def phrases(text: str) -> list[str]:
    """ "<cat1> cat, <dog1> dog" → ["<cat1> cat", "<dog1> dog"]."""
    return [part.strip() for part in re.split(r"[,;\n]", text or "") if part.strip()]


def words_of(studio: Studio, given: Mapping[str, Any]) -> list[str]:
    """The command line of a training.  UserError for what is missing."""
    pictures = [str(studio.folder.picture(path)) for path in given["pictures"] or []]
    if not pictures:
        raise UserError("there is no picture: drop one on the frame, or choose one of the list")
    if not (given["name"] or "").strip():
        raise UserError("the adapter has no name: write the folder it is to go to, such as my-cat")
    folder = studio.folder.inside(given["name"])
    if (studio.folder.root / folder / MANIFEST).exists():
        raise UserError(f"{folder} holds an adapter already, which would be replaced: write another name")
    several = given["mode"] == SEVERAL
    masks = [
        mask and studio.folder.keep_mask(mask, f"mask-{number}")
        for number, mask in enumerate(drawn_on(given["board"], Path(pictures[0])).get("masks") or [], 1)
    ]
    words = ["train", "multi_concept" if several else "single_image", *(pictures[:1] if several else pictures)]
    words += option("config", *chosen_presets(given, "multi_concept" if several else "single_image"))
    if given["base"] not in (OWN_BASE, None):
        named = given["base"] if given["base"] == studio.bench.base else studio.folder.existing(given["base"])
        words += option("pretrained_model_name_or_path", named)
    words += several_words(given, masks, pictures) if several else single_words(given, masks, pictures)
    words += option("output_dir", folder)
    for name in ("rank", "resolution"):
        words += option(name, int(given[name]) if given[name] else None)
    words += option("seed", int(given["seed"]) if given["seed"] else None)
    return [*words, "--person"] if given["person"] else words


def chosen_presets(given: Mapping[str, Any], trainer: str) -> list[str]:
    """The presets that this trainer has, the base's own first."""
    known = launch.presets(trainer)
    wanted = [given["preset"], *(given["extra"] or [])]
    missing = [name for name in wanted if name not in (*known, "none", None)]
    if missing:
        raise UserError(f"there is no preset {missing[0]} for this: choose {', '.join(known)}")
    return [name for name in wanted if name in known]


def single_words(given: Mapping[str, Any], masks: list[Any], pictures: list[str]) -> list[str]:
    """The options of a training on one subject."""
    if any(masks) and len(pictures) > 1:
        raise UserError("a painted mask belongs to one picture: choose one, or clear the mask")
    words = [f"--caption={given['caption']}"] if (given["caption"] or "").strip() else []
    if not words and not given["captioner"]:
        words = ["--caption="]  # which the command refuses, in its own words
    words += option("caption_model", given["captioner"] or None) + option("instance_mask", masks[0] if masks else None)
    words += option("instance_token", (given["token"] or "").strip() or None)
    return words + option("max_train_samples", int(given["samples"]) if given["samples"] else None)


def several_words(given: Mapping[str, Any], masks: list[Any], pictures: list[str]) -> list[str]:
    """The options of a training on several subjects of one picture."""
    if len(pictures) > 1:
        raise UserError("several subjects are learned from one picture that shows them all: choose one")
    named = phrases(given["concepts"])
    if not named:
        raise UserError("there are no subjects: write for each its new word and what it is, such as <cat1> cat")
    painted = [mask for mask in masks if mask]
    if painted and len(painted) != len(named):
        raise UserError(f"{len(painted)} of {len(named)} subjects are painted: paint each, or none")
    words = option("concepts", *named) + option("instance_prompt", given["caption"] or None) + option("masks", *painted)
    words += option("num_class_images", int(given["class_images"]) if given["class_images"] else None)
    steps = max(1, int(given["samples"]) // 8) if given["samples"] else None
    return [*words, *option("max_train_steps", steps), "--attention_maps"]
