"""The options of the editing commands have the defaults, choices and documented values of the settings they fill."""

from __future__ import annotations

import inspect
import re
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest

from personalize.cli.commands.drag import drag_settings
from personalize.cli.commands.edit import edit_strengths
from personalize.cli.commands.edit_image import photo_settings
from personalize.cli.drag_options import DragConfig
from personalize.cli.edit_options import EditConfig, PhotoConfig
from personalize.cli.parser import parse
from personalize.editing import defaults
from personalize.editing.config import (
    DEFAULT_STRENGTHS,
    ControlSettings,
    DynamicSettings,
    EditStrengths,
    Sampling,
    UniformSettings,
)
from personalize.editing.drag.config import DragSettings
from personalize.editing.dynamic_prompt_learning.leakage import NounRegions
from personalize.editing.photo_settings import PhotoSettings
from personalize.editing.real_image_settings import EditRequest
from personalize.models.config import InferenceOptions
from personalize.sampling.config import NullTextSettings

SETTINGS: dict[type, dict[str, tuple[type, str]]] = {  # command's options: option → the setting that it fills
    PhotoConfig: {
        "target": (EditRequest, "target"), "swap": (EditRequest, "swaps"), "local": (EditRequest, "local"),
        "mask": (EditRequest, "mask"), "strict_background": (EditRequest, "strict"),
        "nouns": (NounRegions, "nouns"), "background_mask": (NounRegions, "background"),
        "inversion": (PhotoSettings, "inversion"), "num_inference_steps": (PhotoSettings, "steps"),
        "guidance_scale": (PhotoSettings, "guidance_scale"), "seed": (PhotoSettings, "seed"),
        "fixed_point_iterations": (PhotoSettings, "fixed_point"), "controller": (PhotoSettings, "controller"),
        "resolution": (PhotoSettings, "resolution"),
        "mode": (ControlSettings, "mode"), "cross_replace_steps": (ControlSettings, "cross_replace_steps"),
        "self_replace_steps": (ControlSettings, "self_replace_steps"),
        "bind_adjectives": (ControlSettings, "bind_adjectives"),
        "dpl_words_only": (DynamicSettings, "words_only"),
        "uniform_until": (UniformSettings, "until"), "uniform_quantile": (UniformSettings, "quantile"),
        "uniform_auxiliary": (UniformSettings, "auxiliary"),
        "null_text_iterations": (NullTextSettings, "iterations"),
        "null_text_tolerance": (NullTextSettings, "tolerance"),
        "gradient_checkpointing": (NullTextSettings, "gradient_checkpointing"),
    },
    DragConfig: {
        "method": (DragSettings, "method"), "mode": (DragSettings, "mode"),
        "region_map": (DragSettings, "region_map"), "clearance": (DragSettings, "clearance"),
        "num_inference_steps": (DragSettings, "steps"),
        "strength": (DragSettings, "strength"), "displacement": (DragSettings, "displacement"),
        "fill": (DragSettings, "fill"), "mask_threshold": (DragSettings, "mask_threshold"),
        "mask_most": (DragSettings, "mask_most"), "refine": (DragSettings, "refine"),
        "user_mask": (DragSettings, "user_mask"), "weights": (DragSettings, "weights"),
        "fill_keys": (DragSettings, "fill_keys"), "protect": (DragSettings, "protect"),
        "seed": (DragSettings, "seed"),
    },
    EditConfig: {
        "num_inference_steps": (Sampling, "steps"), "scheduler": (Sampling, "scheduler"),
        "guidance_scale": (Sampling, "guidance_scale"),
        "torch_compile": (Sampling, "torch_compile"), "cuda_graph": (Sampling, "cuda_graph"),
    },
}  # fmt: skip
BY_BASE: dict[type, dict[str, tuple[type, str]]] = {  # None on the command line: the default depends on the base model
    PhotoConfig: {
        "dpl_updates": (DynamicSettings, "updates"), "dpl_balancing": (DynamicSettings, "balancing"),
        "dpl_disjoint": (DynamicSettings, "disjoint"), "dpl_background": (DynamicSettings, "background"),
        "null_text_rate": (NullTextSettings, "rate"),
    },
    DragConfig: {},
    EditConfig: {},
}  # fmt: skip
STRENGTHS = ("alpha", "beta", "gamma", "forget", "strength")  # of EditConfig: empty or None means `EditStrengths`
OTHERS = {  # options that fill no setting: what to work on, where to write, which of several things to do
    PhotoConfig: "photo source weight dpl report region uniform attention_maps trajectory adapter add "
    "keep_exif from_ output_dir",
    DragConfig: "photo from_ to preview mask add remove grow shrink prompt adapter resolution paste keep_exif "
    "output_dir",
    EditConfig: "adapter prompt negative_prompt add auto budget clip_model identity_model source_image seed seeds "
    "num_images height width source_caption from_ output_dir",
}
LINES = {  # the least that each command takes
    PhotoConfig: ["photo.png", "--source", "a cat"],
    DragConfig: ["photo.png", "--from", "1,2", "--to", "3,4"],
    EditConfig: ["folder", "--prompt", "a cat"],
}
CONFIGS = list(SETTINGS)


def default(kind: type, name: str) -> Any:
    field = next(field for field in fields(kind) if field.name == name)
    return field.default if field.default_factory is MISSING else field.default_factory()


def plain(value: Any) -> Any:
    """Sequences count by their items: an option is a tuple where a setting may be any sequence."""
    return tuple(value) if isinstance(value, list | tuple) else value


def choices(kind: type, name: str) -> tuple[str, ...] | None:
    hint = get_type_hints(kind)[name]
    return get_args(hint) if get_origin(hint) is Literal else None


@pytest.mark.parametrize("config", CONFIGS)
def test_every_option_is_accounted_for(config: type):
    """So that a new option cannot escape the comparison below."""
    strengths = STRENGTHS if config is EditConfig else ()
    known = [*SETTINGS[config], *BY_BASE[config], *strengths, *OTHERS[config].split()]
    inherited = {field.name for field in fields(InferenceOptions)}
    assert sorted(known) == sorted({field.name for field in fields(config)} - inherited)


@pytest.mark.parametrize(("config", "option"), [(config, option) for config in CONFIGS for option in SETTINGS[config]])
def test_an_option_has_the_default_and_the_choices_of_its_setting(config: type, option: str):
    kind, name = SETTINGS[config][option]
    value = default(config, option)
    assert plain(value) == plain(default(kind, name)) and isinstance(value, bool) == isinstance(
        default(kind, name), bool
    )
    if choices(kind, name):
        assert choices(config, option) == choices(kind, name)


def documented(config: type, option: str) -> str:
    """The help text of an option: the string below its field."""
    match = re.search(rf'^    {option}: .*\n    """(.*)"""', inspect.getsource(config), re.M)
    assert match, f"{config.__name__}.{option} has no help text"
    return match[1]


@pytest.mark.parametrize("option", BY_BASE[PhotoConfig])
def test_a_default_by_base_is_open_and_its_help_says_both_values(option: str):
    kind, name = BY_BASE[PhotoConfig][option]
    published, embedded = (getattr(defaults.settings_for(kind, base), name) for base in ("published", "embedded"))
    assert default(PhotoConfig, option) is None and published == default(kind, name)
    assert f"by default {published:g}, on the package's model {embedded:g}" in documented(PhotoConfig, option)


def test_the_help_says_the_guidance_scales_of_both_bases():
    edit, ddpm, drawn = defaults.GUIDANCE, defaults.AFTER_DDPM, defaults.text_to_image_guidance
    said = documented(PhotoConfig, "guidance_scale")
    assert f"by default {edit['published']:g}, with ddpm {ddpm['published']:g}" in said
    assert f"on the package's model {edit['embedded']:g} and {ddpm['embedded']:g}" in said
    said = documented(EditConfig, "guidance_scale")
    assert f"by default {drawn('published'):g}, on the package's model {drawn('embedded'):g}" in said


def test_strengths_that_are_not_given_are_those_of_edit_strengths():
    config = parse(EditConfig, LINES[EditConfig], prog="x")
    assert list(edit_strengths(config)) == [DEFAULT_STRENGTHS] == [EditStrengths()]
    for option in ("alpha", "beta"):
        assert f"by default {default(EditStrengths, option):g}" in documented(EditConfig, option)


def test_a_command_line_without_options_gives_the_default_settings():
    """The same through the commands: what they hand on is what the Python functions use by default."""
    config = parse(PhotoConfig, LINES[PhotoConfig], prog="x")
    for base in ("published", "embedded"):
        expected = replace(PhotoSettings(), null_text=defaults.settings_for(NullTextSettings, base))
        assert photo_settings(config, base) == expected
        switched = photo_settings(replace(config, dpl=True, uniform=True), base)
        assert switched.dynamic == defaults.settings_for(DynamicSettings, base)
        assert switched.uniform == UniformSettings()
    assert drag_settings(parse(DragConfig, LINES[DragConfig], prog="x")) == DragSettings()
    assert parse(EditConfig, LINES[EditConfig], prog="x").adapter == Path("folder")
