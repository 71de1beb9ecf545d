"""No number among the options is without a range, on the command line and in Python."""

from __future__ import annotations

import importlib
import math
import re
from dataclasses import fields, is_dataclass
from itertools import chain
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch

from personalize.adapters.export import baked
from personalize.adapters.lora_scales import scaled
from personalize.adapters.merging import merged
from personalize.cli import launch
from personalize.editing.config import DynamicSettings, EditStrengths, Sampling
from personalize.editing.drag.config import DragSettings
from personalize.editing.editor import Editor
from personalize.editing.photo_settings import PhotoSettings
from personalize.editing.real_image_settings import EditRequest
from personalize.errors import UserError
from personalize.models.ranges import RANGES, check_number, check_ranges
from personalize.sampling.config import NullTextSettings
from personalize.training.config import MultiConceptConfig, SingleImageConfig
from tests.support.lora_states import random_adapter
from tests.support.tiny import tiny

MODULES = ("models.config", "training.config", "editing.config", "editing.photo_settings", "editing.drag.config",
           "sampling.config", "cli.options", "cli.edit_options", "cli.drag_options")  # fmt: skip


def classes() -> list[type]:
    modules = [importlib.import_module(f"personalize.{name}") for name in MODULES]
    modules += [launch.load_script(path) for room in ("train", "export") for path in launch.scripts(room).values()]
    found = chain.from_iterable(vars(module).values() for module in modules)
    return list({kind: None for kind in found if isinstance(kind, type) and is_dataclass(kind)})


def holds_numbers(hint: Any) -> bool:
    parts = () if get_origin(hint) is Literal else get_args(hint)
    return hint in (int, float) or any(map(holds_numbers, parts))


def test_every_number_option_has_a_range_that_its_default_is_in() -> None:
    for kind in classes():
        hints = get_type_hints(kind)
        names = [field.name for field in fields(kind) if holds_numbers(hints[field.name])]
        assert not {name.rstrip("_") for name in names} - set(RANGES), f"{kind}: name them in models/ranges.py"
        defaults = {field.name: field.default for field in fields(kind)}
        for name in names:
            low, high = RANGES[name.rstrip("_")]
            values = defaults[name] if isinstance(defaults[name], tuple) else (defaults[name],)
            assert all(low <= value <= high for value in values if isinstance(value, int | float)), (kind, name)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 10**30])
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (kind, field.name)
        for kind in (EditStrengths, Sampling, PhotoSettings, DragSettings, NullTextSettings, DynamicSettings,
                     SingleImageConfig, MultiConceptConfig)
        for field in fields(kind) if holds_numbers(get_type_hints(kind)[field.name])
    ],
)  # fmt: skip
def test_the_settings_check_them_in_python_too(kind: Any, name: str, value: float) -> None:
    given = (value, value) if get_origin(get_type_hints(kind)[name]) is tuple else value
    with pytest.raises(UserError, match=f"{name} is"):
        kind(**{name: given})


def test_what_arrived_and_what_was_expected() -> None:
    with pytest.raises(UserError, match=r"^--strength is 1e\+06: give a number from -20 to 20$"):
        strengths = object.__new__(EditStrengths)
        for field in fields(EditStrengths):
            object.__setattr__(strengths, field.name, 1e6 if field.name == "strength" else field.default)
        check_ranges(strengths, "--")


@pytest.mark.parametrize("value", ["0.8", b"1", "nan"])
def test_text_is_no_number_in_python(value: Any) -> None:
    with pytest.raises(UserError, match="alpha is .*, expected a number"):
        EditStrengths(alpha=value)


NOT_WHOLE = [1.5, "1", None, True, [1], {"a": 1}, (1, 2, 3)]


@pytest.mark.parametrize("value", NOT_WHOLE)
@pytest.mark.parametrize(
    ("kind", "name"),
    [(Sampling, "steps"), (DragSettings, "steps"), (DragSettings, "window"), (PhotoSettings, "seed"),
     (SingleImageConfig, "rank"), (MultiConceptConfig, "max_train_steps")],
)  # fmt: skip
def test_a_count_is_whole(kind: Any, name: str, value: Any) -> None:
    """A rank of 1.5, True or [1] went as far as torch."""
    with pytest.raises(UserError, match=rf"^{name} is {re.escape(repr(value))}, expected a whole number$"):
        kind(**{name: value})


@pytest.mark.parametrize(
    ("kind", "name", "value", "said"),
    [
        (DragSettings, "strength", [0.5], "strength is [0.5], expected a number or None"),
        (Sampling, "size", 64, "size is 64, expected several, each a whole number or None"),
        (Sampling, "size", (64, 64, 64), "size is (64, 64, 64), expected several, each a whole number or None"),
        (SingleImageConfig, "random_flip", "no", "random_flip is 'no', expected True or False"),
        (PhotoSettings, "inversion", "dirct", "inversion is 'dirct': choose one of direct, ddim, negative, null-text"),
        (PhotoSettings, "controller", None, "controller is None: choose one of p2p, mutual"),
    ],
)
def test_a_setting_is_of_its_type(kind: Any, name: str, value: Any, said: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(said)}"):
        kind(**{name: value})


def test_numbers_of_numpy_and_torch_are_numbers() -> None:
    assert Sampling(steps=np.int64(5), guidance_scale=np.float32(2)).steps == 5
    assert SingleImageConfig(learning_rate=torch.tensor(1e-4)).learning_rate == pytest.approx(1e-4)
    for wrong in (np.int64(-1), torch.tensor(-1), np.ones(2)):
        with pytest.raises(UserError, match="steps is"):
            Sampling(steps=wrong)
    for wrong in (torch.tensor(math.nan), np.float32("inf"), np.ones(2), np.True_, torch.tensor(True)):
        with pytest.raises(UserError, match="strength is"):
            check_number("strength", wrong)
        with pytest.raises(UserError, match="gamma is"):
            EditStrengths(gamma=wrong)
    check_number("strength", torch.tensor(0.5))
    with pytest.raises(UserError, match="^seed is 1.5, expected a whole number$"):
        check_number("seed", 1.5, kind=int)
    with pytest.raises(UserError, match="^strength is 20.0000001: give a number from -20 to 20$"):
        check_number("strength", 20.0000001)


WRONG = [float("nan"), float("inf"), 1e6, "1", None, True]


@pytest.mark.parametrize("value", WRONG)
@pytest.mark.parametrize("name", ["strength", "weights", "seed"])
def test_an_argument_is_checked_as_an_option_is(name: str, value: Any) -> None:
    if (name, value) == ("seed", 1e6):
        value = -1
    with pytest.raises(UserError, match=f"^{name} is "):
        check_number(name, value)
    check_number(name, 1)


@pytest.mark.parametrize("value", WRONG)
def test_arguments_of_adapters_are_checked_before_a_model_is_changed(value: Any) -> None:
    model = tiny("sd1")
    adapter = random_adapter(model)
    names = list(model.unet.state_dict())
    for attempt in (
        lambda: adapter.apply(model, strength=value).__enter__(),
        lambda: adapter.apply_text(model, value).__enter__(),
        lambda: scaled(model.unet, strength=value).__enter__(),
        lambda: baked(adapter, strength=value),
        lambda: merged([adapter, adapter], [1.0, value], ["a", "b"]),
        lambda: Editor(model, adapter).edit("a cat", seeds=[-1 if value == 1e6 else value]),
    ):
        with pytest.raises(UserError, match="(strength|weights|seed) is "):
            attempt()
    assert list(model.unet.state_dict()) == names


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), 1e9, -1e9])
def test_weights_of_words_have_a_range(factor: float) -> None:
    with pytest.raises(UserError, match="the weight of 'cat' is"):
        EditRequest(weights={"cat": factor})
