"""The settings that the options of `personalize drag` give, checked before torch is imported."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from personalize.editing.drag.config import DragSettings
from personalize.errors import UserError


def drag_settings(config: Any) -> DragSettings:
    """The settings that the options give; all others have their defaults."""
    if config.grow and config.shrink:
        raise UserError(f"--grow {config.grow} and --shrink {config.shrink} undo one another: give one of them")
    for name in ("grow", "shrink"):
        if getattr(config, name) < 0:
            raise UserError(f"--{name} is {getattr(config, name)}, expected 0 or more pixels")
    same = {field.name for field in fields(DragSettings)} & {field.name for field in fields(config)}
    given: dict[str, Any] = {name: getattr(config, name) for name in same}
    given |= {"steps": config.num_inference_steps, "grow": config.grow - config.shrink}
    return DragSettings(**given)
