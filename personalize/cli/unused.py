"""Options that have no effect without another one that is not given; read before torch is imported."""

from __future__ import annotations

from typing import Any

from personalize.errors import UserError
from personalize.models.config import notice_unused

GUIDED = "--guidance_scale above 1"


def _guided(config: Any) -> bool:
    """Is there an unconditional pass, as by default?"""
    return config.guidance_scale is None or config.guidance_scale > 1


def check_unused_of_edit(config: Any) -> None:
    """A Notice for options of `edit` with an adapter that have no effect."""
    notice_unused(config, {GUIDED: (_guided(config), "negative_prompt")})


def check_unused_of_photo(config: Any) -> None:
    """A Notice for options of `edit PHOTO` that have no effect; for --strict_background a UserError.

    What --report leaves out because it edits nothing, such as --target, is in its name, and not said.
    """
    if config.strict_background and not config.uniform:
        raise UserError("--strict_background belongs to --uniform: give that too, or name the region with --mask")
    fits_nulls, p2p = config.inversion == "null-text", config.controller == "p2p"
    reads_nouns = config.dpl or config.report
    notice_unused(config, {
        "--dpl": (config.dpl, "dpl_updates dpl_balancing dpl_disjoint dpl_background dpl_words_only"),
        "--dpl or --report": (reads_nouns, "nouns background_mask region"),
        "--uniform": (config.uniform, "uniform_until uniform_quantile uniform_auxiliary"),
        "--cross_replace_steps above 0": (config.cross_replace_steps > 0, "weight mode bind_adjectives"),
        "--inversion null-text": (fits_nulls, "null_text_iterations null_text_rate null_text_tolerance"),
        "--inversion null-text or --dpl": (fits_nulls or config.dpl, "gradient_checkpointing"),
        "--controller p2p": (p2p, "mode cross_replace_steps self_replace_steps bind_adjectives"),
        "--mode auto or refine": (config.mode != "replace" or not p2p, "bind_adjectives"),
        "--inversion ddpm or none": (config.inversion in ("ddpm", "none"), "seed"),
        GUIDED: (_guided(config) or not fits_nulls, "null_text_iterations null_text_rate null_text_tolerance"),
    })  # fmt: skip
    notice_unused(config, {
        "--mask": (config.mask is None or not config.uniform, "uniform_quantile"),
        "--region": (not config.region or not reads_nouns, "background_mask"),
        "--report": (not config.report, "inversion fixed_point_iterations trajectory attention_maps"),
    }, "beside")  # fmt: skip


def check_unused_of_drag(config: Any) -> None:
    """A Notice for options of `drag` that have no effect with the chosen method and mode."""
    notice_unused(config, {
        "--method pixels": (config.method == "pixels", "grow shrink refine clearance fill_keys"),
        "--method latents": (config.method == "latents", "paste"),
        "--mode region": (config.mode == "region", "region_map"),
        "--mode deform": (config.mode == "deform", "displacement"),
        "--mask": (config.mask is not None, "user_mask"),
        "--fill attention": (config.method == "pixels" or config.fill == "attention", "seed"),
    })  # fmt: skip
    found = config.mask is None or config.user_mask == "intersect"  # by attention
    notice_unused(config, {
        "--mask": (found, "mask_threshold mask_most" + " refine" * (config.method == "pixels")),
    }, "beside")  # fmt: skip
