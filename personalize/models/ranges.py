"""The range of every number among the options, by name: read where a command line is parsed, and by the settings.

A number outside its range gives no picture and no adapter that anybody wants: mostly a black one.  Where more is known
of a setting than its name tells, its class checks that too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from personalize.errors import UserError

NUMBERS = ("int", "float", "int | None", "float | None")  # types of fields, as they are written
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
        "until uniform_until mask_threshold mask_most pairs variety caption_dropout ema_decay ema_start word_steps "
        "ema_max_decay proportion_empty_prompts"
    ),
    COUNT: (
        "max_train_samples min_train_samples samples_per_picture checkpointing_steps "
        "checkpoints_total_limit validation_steps"
    ),
    STEPS: (
        "class_image_steps preview_steps iterations null_text_iterations updates dpl_updates "
        "fixed_point fixed_point_iterations lr_warmup_steps num_class_images num_validation_images scene scenes "
        "scene_pools autoencoded test_scenes dataloader_num_workers min_rank widths top_k mask_fewest steps kv_start "
        "kv_levels map_levels map_timesteps"
    ),
    PIXELS: "height width size resolution dilate shrink margin window self_max_side",
    SEED: "seed seeds",
    (1, 10**6): (
        "max_train_steps num_inference_steps samples_per_update train_batch_size batch_sizes budget num_images rank "
        "gradient_accumulation_steps adapters_per_batch num_vectors"
    ),
    (0, 100): "guidance_scale", (0, 2**16 - 1): "port", (-(2**14), 2**14): "grow",  # a mask that shrinks grows by less
}  # fmt: skip
RANGES = {name: limits for limits, names in _NAMES.items() for name in names.split()}


def check_ranges(options: Any, prefix: str = "") -> None:
    """UserError, naming the field, unless every number in the dataclass `options` is finite and in its range."""
    for field in fields(options):
        name, value = field.name.rstrip("_"), getattr(options, field.name, None)
        if str(field.type) in NUMBERS and isinstance(value, str | bytes):
            raise UserError(f"{prefix}{name} is {value!r}, expected a number")
        for number in _numbers(value):
            _check_limits(f"{prefix}{name}", number, RANGES.get(name, (-math.inf, math.inf)))


def check_number(name: str, value: Any, limits: tuple[float, float] | None = None) -> None:
    """UserError unless `value`, an argument called `name`, is a finite number in `limits`, or in those of its name."""
    if not hasattr(value, "__float__") or isinstance(value, bool):
        raise UserError(f"{name} is {value!r}, expected a number")
    _check_limits(name, value, RANGES[name] if limits is None else limits)


def _check_limits(name: str, value: float, limits: tuple[float, float]) -> None:
    """UserError, which says `name`, unless `value` is finite and within `limits`."""
    low, high = limits
    if not isinstance(value, int) and not math.isfinite(value):
        raise UserError(f"{name} is {value}, expected a number: give a finite one")
    if not low <= value <= high:
        raise UserError(f"{name} is {_number(value)}: give a number from {low:g} to {_number(high)}")


def _number(value: float) -> str:
    if isinstance(value, int) and abs(value) >= 10**20:
        return "a number of more than 20 digits"  # which may be too large for a float
    return f"{value:,}" if isinstance(value, int) and abs(value) >= 10**5 else f"{value:g}"


def _numbers(value: Any) -> Iterator[float]:
    """The numbers that a field holds: itself, or those of a tuple."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _numbers(part)
