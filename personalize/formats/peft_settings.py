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
from personalize.formats.adapter_folders import ADAPTER_CONFIG
from personalize.io.json_files import parse_json

BASE_PREFIX = "base_model.model."  # before the path of every module in PEFT's files
UNPREFIXED = {"r", "lora_alpha"}  # the settings of a model that was saved without its pipeline
SCALED_BY_SETTINGS = ("LOHA", "LOKR")  # PEFT's kinds whose factors do not show the rank that alpha is divided by
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
    rank_pattern: Mapping[str, float] = field(default_factory=dict)
    kind: str = "LORA"
    unclear: str = ""
    """Why alpha in the header is unusable, which is an error for a module without an alpha tensor alone."""

    def alpha_of(self, path: str) -> float | None:
        """alpha of the module at `path`: of the first pattern that fits it, else `alpha`."""
        return _of_pattern(self.alpha_pattern, path, self.alpha)

    def rank_of(self, path: str) -> float | None:
        """r of the module at `path`: of the first pattern that fits it, else `rank`."""
        return _of_pattern(self.rank_pattern, path, self.rank)


def _of_pattern(patterns: Mapping[str, float], path: str, otherwise: float | None) -> float | None:
    """The value of the first pattern that fits the module at `path`, else `otherwise`."""
    paths = {path, path.removeprefix("text_model.")}  # with and without the level that transformers has dropped
    fitting = (value for pattern, value in patterns.items() if any(_fits(pattern, one) for one in paths))
    return next(fitting, otherwise)


def _fits(pattern: str, path: str) -> bool:
    """True if PEFT's `get_pattern_key` would take `pattern` for the module at `path`."""
    try:
        return regex.match(rf"(?:.*\.)?(?:{pattern})$", path, timeout=MATCH_SECONDS) is not None
    except (regex.error, TimeoutError) as error:
        raise UserError(f"the file's pattern {pattern[:80]!r} cannot be matched ({error}): mend it") from error


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
    """Settings that stand in plain keys of the header; "None", as Python writes it, says nothing."""
    texts = [metadata[key] for key in HEADER_ALPHAS if metadata.get(key, "None") != "None"]
    if not texts:
        return {}
    stabilized = metadata.get("use_rslora", "").lower() == "true"
    try:
        values = {_positive(float(text), "alpha", source) for text in texts}
    except ValueError as error:  # a UserError too
        said = str(error) if isinstance(error, UserError) else ""
        said = said or f"{source}: alpha in its header is {texts[0][:40]!r}, a number was expected"
        return {"": PeftSettings(rank_stabilized=stabilized, unclear=said)}
    if len(values) > 1:
        said = f"{source}: its header gives two values of alpha, {sorted(values)}: which is right?"
        return {"": PeftSettings(rank_stabilized=stabilized, unclear=said)}
    return {"": PeftSettings(values.pop(), None, stabilized)}


def _parsed(values: Mapping[str, Any], prefix: str, source: object) -> PeftSettings:
    """The settings whose names start with `prefix`."""
    _require_unchanged_base(values.get(f"{prefix}init_lora_weights"), source)
    kind = str(values.get(f"{prefix}peft_type") or "LORA")
    name = "alpha" if kind in SCALED_BY_SETTINGS else "lora_alpha"
    alpha, rank = values.get(f"{prefix}{name}"), values.get(f"{prefix}r")
    return PeftSettings(
        None if alpha is None else _positive(alpha, name, source),
        rank if type(rank) is int else None,
        values.get(f"{prefix}use_rslora") is True,
        _pattern(values.get(f"{prefix}alpha_pattern"), "alpha_pattern", source),
        _pattern(values.get(f"{prefix}rank_pattern"), "rank_pattern", source) if kind in SCALED_BY_SETTINGS else {},
        kind,
    )


def _pattern(patterns: Any, name: str, source: object) -> dict[str, float]:
    """PEFT's `alpha_pattern` or `rank_pattern`; UserError if it is no object of short patterns and positive numbers."""
    patterns = patterns or {}
    if not isinstance(patterns, dict) or len(patterns) > MAX_PATTERNS:
        raise UserError(f"{source}: its {name} is {patterns!r:.80}: an object was expected")
    if wrong := next((key for key in patterns if len(key) > MAX_PATTERN_LENGTH), None):
        raise UserError(f"{source}: a pattern of {name} has {len(wrong)} characters, up to 300 are expected")
    return {key: _positive(value, f"{name}[{key!r:.80}]", source) for key, value in patterns.items()}


def _require_unchanged_base(start: Any, source: object) -> None:
    """UserError if training started from factors that PEFT took out of the base's weights (PiSSA, OLoRA, …).

    W₀ + s · (B A − B₀ A₀) was trained, and B₀ A₀ is not in the file.  PEFT sets `init_lora_weights` to true where it
    saves the difference, as a plain LoRA of twice the rank.
    """
    if isinstance(start, str) and start.lower().startswith(FROM_THE_BASE):
        how = "save it again in PEFT with path_initial_model_for_weight_conversion, which makes a plain LoRA of it"
        if start.lower() == "loftq":
            how = "merge it in PEFT into the model it was trained in (merge_and_unload), and use that model"
        raise UserError(
            f"{source} was trained from init_lora_weights={start[:40]!r}, which changes the base's weights as well, so "
            f"that it is no change of the original base: {how}"
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
    alpha = _own_alpha(module, parts)
    if not alpha and own.unclear:
        raise UserError(own.unclear)
    if not alpha:  # no alpha tensor; kohya's tools take 0 for none, too
        alpha = own.alpha_of(path) or rank
    return _positive(alpha, "alpha", f"module {module}") / (rank**0.5 if own.rank_stabilized else rank)


def _own_alpha(module: str, parts: Mapping[str, Tensor]) -> float:
    """The module's alpha tensor as a number; 0 if it has none.  UserError for one of several numbers."""
    if "alpha" not in parts:
        return 0
    if parts["alpha"].numel() != 1:
        raise UserError(f"module {module} has an alpha of shape {tuple(parts['alpha'].shape)}: one number was expected")
    return parts["alpha"].item()


def strength(module: str, parts: Mapping[str, Tensor], settings: Mapping[str, PeftSettings]) -> float:
    """The factor of a module's ΔW that its own tensors do not hold: s of a LoRA, alpha / r of PEFT's LoHa and LoKr.

    LyCORIS writes an alpha for each LoHa and LoKr, by which `weight_changes` scales it; PEFT writes none.
    """
    if "A" in parts:
        return scaling(module, parts, settings)
    alpha = _own_alpha(module, parts)
    component, path = module.split(".", 1)
    own = settings.get(component, settings.get("", PeftSettings()))
    if own.kind not in SCALED_BY_SETTINGS or alpha:
        return 1.0
    alpha, rank = own.alpha_of(path), own.rank_of(path)
    return alpha / rank if alpha and rank else 1.0
