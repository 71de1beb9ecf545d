"""The range of every number among the options, by name: read where a command line is parsed, and by the settings.

A number outside its range gives no picture and no adapter that anybody wants.  Where more is known of a setting than
its name tells, its class checks that too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import msgspec

from personalize.errors import UserError

LARGEST_WORD_WEIGHT = 100  # factor on the attention to a word
MIX, FACTOR = (-20, 20), (0, 10**4)  # weights of embeddings and adapters; weights of losses
RATE, FRACTION = (0, 10), (0, 1)
COUNT, STEPS, PIXELS, SEED = (0, 10**9), (0, 10**6), (0, 2**14), (0, 2**63 - 1)
_NAMES: dict[tuple[float, float], str] = {
    MIX: "alpha beta gamma strength weights",
    FACTOR: (
        "prior_loss_weight calibration_weight grounding_weight snr_gamma early_stop_loss max_grad_norm balancing "
        "balancing_limit disjoint background dpl_balancing dpl_disjoint dpl_background threshold_scale cap "
        "alpha_rank_scale lora_alpha mask_weight clearance"
    ),
    RATE: (
        "learning_rate learning_rates text_embedding_lr text_encoder_lr token_learning_rate adam_weight_decay rate "
        "null_text_rate tolerance null_text_tolerance growth"
    ),
    FRACTION: (
        "swap_subjects blend_start blend_threshold cross_replace_steps self_replace_steps quantile uniform_quantile "
        "until uniform_until mask_threshold mask_most pairs variety windows caption_dropout ema_decay ema_start "
        "word_steps ema_max_decay proportion_empty_prompts"
    ),
    COUNT: (
        "max_train_samples min_train_samples samples_per_picture checkpointing_steps "
        "checkpoints_total_limit validation_steps"
    ),
    STEPS: (
        "preview_steps iterations null_text_iterations updates dpl_updates "
        "fixed_point fixed_point_iterations lr_warmup_steps num_class_images scene scenes "
        "scene_pools autoencoded test_scenes dataloader_num_workers min_rank widths top_k mask_fewest steps kv_start "
        "kv_levels map_levels map_timesteps"
    ),
    PIXELS: "height width size resolution dilate shrink margin window self_max_side",
    SEED: "seed seeds",
    (1, 10**6): (
        "max_train_steps num_inference_steps samples_per_update train_batch_size batch_sizes budget num_images rank "
        "gradient_accumulation_steps adapters_per_batch num_vectors num_validation_images class_image_steps"
    ),
    (0, 100): "guidance_scale", (0, 2**16 - 1): "port", (-(2**14), 2**14): "grow",  # below 0 the mask shrinks
}  # fmt: skip
_KINDS = {int: "a whole number", float: "a number", bool: "True or False", NoneType: "None"}
RANGES = {name: limits for limits, names in _NAMES.items() for name in names.split()}


def check_ranges(options: Any, prefix: str = "") -> None:
    """UserError, naming the field, unless every number in the dataclass `options` is finite and in its range.

    Fields of numbers, of truth values and of a choice of words must also be of their type: a count is whole.
    """
    types = _checked_types(type(options))
    for field in fields(options):
        name, value = field.name.rstrip("_"), getattr(options, field.name, None)
        if field.name in types:
            _check_type(f"{prefix}{name}", value, types[field.name])
        for number in _numbers(value):
            _check_limits(f"{prefix}{name}", number, RANGES.get(name, (-math.inf, math.inf)))


def check_number(name: str, value: Any, limits: tuple[float, float] | None = None, kind: type = float) -> None:
    """UserError unless `value`, an argument called `name`, is a finite number in `limits`, or in those of its name.

    kind: float, or int for a whole number.
    """
    _check_type(name, value, kind)
    _check_limits(name, _plain(value), RANGES[name] if limits is None else limits)


def _check_limits(name: str, value: float, limits: tuple[float, float]) -> None:
    """UserError, which says `name`, unless `value` is finite and within `limits`."""
    low, high = limits
    if not isinstance(value, int) and not math.isfinite(value):
        raise UserError(f"{name} is {value}, expected a number: give a finite one")
    if not low <= value <= high:
        text = _number(value)
        text = repr(value) if text in (_number(low), _number(high)) else text  # 20.0000001 reads as 20
        raise UserError(f"{name} is {text}: give a number from {low:g} to {_number(high)}")


@cache
def _checked_types(options: type) -> dict[str, Any]:
    """The types of those fields of a dataclass that hold numbers, truth values or one of some words, or several."""
    hints = get_type_hints(options)
    return {name: hint for name, hint in hints.items() if all(map(_is_checked, _leaves(hint)))}


def _is_checked(leaf: Any) -> bool:
    return leaf in _KINDS or get_origin(leaf) is Literal


def _leaves(hint: Any) -> list[Any]:
    """The types out of which `hint` is made: int and NoneType for `tuple[int, ...] | None`."""
    parts = [] if get_origin(hint) is Literal else [part for part in get_args(hint) if part is not ...]
    return [leaf for part in parts for leaf in _leaves(part)] if parts else [hint]


def _check_type(name: str, value: Any, hint: Any) -> None:
    """UserError, which says `name`, unless `value` is of the type `hint`; a number of NumPy or torch counts as one."""
    try:
        msgspec.convert(_plain(value), hint)
    except (msgspec.ValidationError, TypeError):
        words = [str(word) for leaf in _leaves(hint) for word in get_args(leaf)]
        if words:
            raise UserError(f"{name} is {value!r}: choose one of {', '.join(words)}") from None
        several = "several, each " if any(get_origin(part) is tuple for part in (hint, *get_args(hint))) else ""
        expected = " or ".join(dict.fromkeys(_KINDS[leaf] for leaf in _leaves(hint)))
        raise UserError(f"{name} is {value!r}, expected {several}{expected}") from None


def _plain(value: Any) -> Any:
    """Python's own number in place of a single one of NumPy's or torch's."""
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", None) == 0 else value


def _number(value: float) -> str:
    if isinstance(value, int) and abs(value) >= 10**20:
        return "a number of more than 20 digits"  # which may be too large for a float
    return f"{value:,}" if isinstance(value, int) and abs(value) >= 10**5 else f"{value:g}"


def _numbers(value: Any) -> Iterator[float]:
    """The numbers that a field holds: itself, or those of a tuple."""
    value = _plain(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _numbers(part)
