"""Options that have no effect without another one that is not given; read before torch is imported."""

from __future__ import annotations

from typing import Any

from personalize.errors import UserError
from personalize.models.config import notice_unused


def check_unused_of_photo(config: Any) -> None:
    """A Notice for options of `edit PHOTO` that have no effect; for --strict_background a UserError."""
    if config.strict_background and not config.uniform:
        raise UserError("--strict_background belongs to --uniform: give that too, or name the region with --mask")
    fits_nulls = config.inversion == "null-text"
    notice_unused(config, {
        "--dpl": (config.dpl, "dpl_updates dpl_balancing dpl_disjoint dpl_background dpl_words_only"),
        "--dpl or --report": (config.dpl or config.report, "nouns background_mask region"),
        "--uniform": (config.uniform, "uniform_until uniform_quantile uniform_auxiliary"),
        "--cross_replace_steps above 0": (config.cross_replace_steps > 0, "weight mode bind_adjectives"),
        "--inversion null-text": (fits_nulls, "null_text_iterations null_text_rate null_text_tolerance"),
        "--inversion null-text or --dpl": (fits_nulls or config.dpl, "gradient_checkpointing"),
        "--controller p2p": (
            config.controller == "p2p", "mode cross_replace_steps self_replace_steps bind_adjectives"
        ),
    })  # fmt: skip


def check_unused_of_drag(config: Any) -> None:
    """A Notice for options of `drag` that have no effect with the chosen method and mode."""
    notice_unused(config, {
        "--method pixels": (config.method == "pixels", "grow shrink refine clearance fill_keys"),
        "--method latents": (config.method == "latents", "paste"),
        "--mode region": (config.mode == "region", "region_map"),
        "--mode deform": (config.mode == "deform", "displacement"),
        "--mask": (config.mask is not None, "user_mask"),
    })  # fmt: skip
