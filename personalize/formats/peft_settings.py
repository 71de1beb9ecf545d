"""The strength alpha / r of every LoRA module, from all places where programs store it.

    ΔW = s · B A        s = alpha / r,  or alpha / √r with rsLoRA

In the order of precedence: the module's own alpha tensor; PEFT's settings, which PEFT stores in `adapter_config.json`
and diffusers as JSON under `lora_adapter_metadata` (of a pipeline each with the name of its part, of a model that was
saved alone without); plain keys of the header (`lora_alpha`, `network_alpha`, `alpha`); else alpha = r.  An
`alpha_pattern` maps regular expressions on module paths to alphas and is matched as PEFT matches it.

Reference: Kalajdzievski, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", arXiv 2312.03732.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import regex
from torch import Tensor

from personalize.errors import UserError
from personalize.io.json_files import parse_json

ADAPTER_CONFIG = "adapter_config.json"  # PEFT's file of settings, and the key under which its text joins the metadata
UNPREFIXED = {"r", "lora_alpha"}  # the settings of a model that was saved without its pipeline
FROM_THE_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")  # beginnings of PEFT's `init_lora_weights`
HEADER_ALPHAS = ("lora_alpha", "network_alpha", "alpha")
MAX_PATTERNS, MAX_PATTERN_LENGTH = 5000, 300
MATCH_SECONDS = 1.0  # for one pattern on one path: a pattern of a file must not be able to run for ever


@dataclass(frozen=True)
class PeftSettings:
    """PEFT's settings of one part of the model, as far as they decide on strengths."""

    alpha: float | None = None
    rank: int | None = None
    rank_stabilized: bool = False
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def alpha_of(self, path: str) -> float | None:
        """alpha of the module at `path`: of the first pattern that fits it, else `alpha`."""
        paths = {path, path.removeprefix("text_model.")}  # with and without the level that transformers has dropped
        fitting = (alpha for pattern, alpha in self.alpha_pattern.items() if any(_fits(pattern, one) for one in paths))
        return next(fitting, self.alpha)


def _fits(pattern: str, path: str) -> bool:
    """True if PEFT's `get_pattern_key` would take `pattern` for the module at `path`."""
    try:
        return regex.match(rf"(?:.*\.)?(?:{pattern})$", path, timeout=MATCH_SECONDS) is not None
    except (regex.error, TimeoutError) as error:
        raise UserError(f"the file's alpha_pattern {pattern[:80]!r} cannot be matched ({error}): mend it") from error


def settings_of(metadata: Mapping[str, str], source: object) -> dict[str, PeftSettings]:
    """The settings by part of the model; under "" those of whichever part the file is for.

    Raises:
        UserError: settings that are no JSON object, or of the wrong kind.
    """
    if ADAPTER_CONFIG in metadata:
        return {"": _parsed(_object(metadata[ADAPTER_CONFIG], f"{source}: its {ADAPTER_CONFIG}"), "", source)}
    values = _object(metadata.get("lora_adapter_metadata", "{}"), f"{source}: its lora_adapter_metadata")
    parts = {key.partition(".")[0] for key in values if "." in key}
    found = {part: _parsed(values, f"{part}.", source) for part in parts}
    if UNPREFIXED & values.keys():  # `unet.save_lora_adapter`, where the pipeline's `save_lora_weights` adds "unet."
        found[""] = _parsed(values, "", source)
    return found or _header_settings(metadata, source)


def _header_settings(metadata: Mapping[str, str], source: object) -> dict[str, PeftSettings]:
    """Settings that stand in plain keys of the header; several values that differ are an error."""
    values = {metadata[key] for key in HEADER_ALPHAS if key in metadata}
    if not values:
        return {}
    if len(values) > 1:
        raise UserError(f"{source}: its header gives two values of alpha, {sorted(values)}: which is right?")
    try:
        alpha = float(next(iter(values)))
    except ValueError as error:
        raise UserError(f"{source}: alpha in its header is {values.pop()[:40]!r}, a number was expected") from error
    stabilized = metadata.get("use_rslora", "").lower() == "true"
    return {"": PeftSettings(_positive(alpha, "alpha", source), None, stabilized)}


def _parsed(values: Mapping[str, Any], prefix: str, source: object) -> PeftSettings:
    """The settings whose names start with `prefix`."""
    _require_unchanged_base(values.get(f"{prefix}init_lora_weights"), source)
    alpha, rank = values.get(f"{prefix}lora_alpha"), values.get(f"{prefix}r")
    patterns = values.get(f"{prefix}alpha_pattern") or {}
    if not isinstance(patterns, dict) or len(patterns) > MAX_PATTERNS:
        raise UserError(f"{source}: its alpha_pattern is {patterns!r:.80}: an object was expected")
    if wrong := next((key for key in patterns if len(key) > MAX_PATTERN_LENGTH), None):
        raise UserError(f"{source}: a pattern of alpha_pattern has {len(wrong)} characters, up to 300 are expected")
    return PeftSettings(
        None if alpha is None else _positive(alpha, "lora_alpha", source),
        rank if type(rank) is int else None,
        values.get(f"{prefix}use_rslora") is True,
        {key: _positive(alpha, f"alpha_pattern[{key!r:.80}]", source) for key, alpha in patterns.items()},
    )


def _require_unchanged_base(start: Any, source: object) -> None:
    """UserError if training started from factors that PEFT took out of the base's weights (PiSSA, OLoRA, …).

    W₀ + s · (B A − B₀ A₀) was trained, and B₀ A₀ is not in the file.  PEFT sets `init_lora_weights` to true where it
    saves the difference, as a plain LoRA of twice the rank.
    """
    if isinstance(start, str) and start.lower().startswith(FROM_THE_BASE):
        how = "path_initial_model_for_weight_conversion, which makes a plain LoRA of it"
        how = "the model it was trained in, merged" if start.lower() == "loftq" else how
        raise UserError(
            f"{source} was trained from init_lora_weights={start[:40]!r}, which changes the base's weights as well, so "
            f"that it is no change of the original base: save it again in PEFT with {how}"
        )


def _object(text: str, name: str) -> dict[str, Any]:
    """Parse a JSON object; UserError if it is anything else."""
    values = parse_json(text, name, "is no JSON")
    if not isinstance(values, dict):
        raise UserError(f"{name} holds a {type(values).__name__}, an object was expected")
    return values


def _positive(value: Any, name: str, source: object) -> float:
    """`value` as a number above 0 and below a million; UserError otherwise."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e6:
        raise UserError(f"{source} has {name} {value!r:.80}: a positive number was expected")
    return value


def scaling(module: str, parts: Mapping[str, Tensor], settings: Mapping[str, PeftSettings]) -> float:
    """The factor s by which a module's B A is multiplied.

    Raises:
        UserError: an alpha that is no positive number.
    """
    component, path = module.split(".", 1)
    rank, own = parts["A"].shape[0], settings.get(component, settings.get("", PeftSettings()))
    alpha = parts["alpha"].item() if "alpha" in parts and parts["alpha"].numel() == 1 else 0
    if not alpha:  # no alpha tensor; kohya's tools take 0 for none, too
        alpha = own.alpha_of(path) or rank
    return _positive(alpha, "alpha", f"module {module}") / (rank**0.5 if own.rank_stabilized else rank)
