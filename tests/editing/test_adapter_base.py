"""The base of an adapter predicts what it did when the adapter was trained."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from personalize.cli.drag_options import DragConfig
from personalize.cli.edit_options import PhotoConfig
from personalize.editing.attach import attach
from personalize.editing.config import Sampling
from personalize.editing.editor import Editor
from personalize.errors import Notice, UserError
from personalize.studio.actions import Workbench
from tests.support.lora_states import random_adapter
from tests.support.tiny import tiny, tiny_folder, tiny_inpainting_pipeline, tiny_pipeline

SHORT = Sampling(2)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A base that says ε, an adapter that was trained on it with v, and one with ε."""
    place = tmp_path_factory.mktemp("predictions")
    base = tiny_folder("sd1", place)
    adapter = random_adapter(tiny("sd1"))
    velocity = replace(adapter, info={**adapter.info, "base": {**adapter.base, "prediction_type": "v_prediction"}})
    return base, velocity.save(place / "velocity"), adapter.save(place / "noise")


def test_an_adapter_is_used_as_it_was_trained(places):
    base, velocity, noise = places
    with warnings.catch_warnings():
        warnings.simplefilter("error", Notice)
        editor, asked = Editor.load(velocity, base), Editor.load(velocity, base, prediction_type="v_prediction")
        assert Editor.load(noise, base).model.prediction_type == "epsilon"
    assert editor.model.prediction_type == "v_prediction"
    pictures = [one.edit("a dog", sampling=SHORT)[0] for one in (editor, asked)]
    assert pictures[0].tobytes() == pictures[1].tobytes()


def test_another_base_predicts_what_it_says_itself(places, tmp_path):
    """An adapter of an ε base on a base that predicts v: what the adapter's own base did does not count there."""
    _, _, noise = places
    other = tiny_folder("sd1", tmp_path)
    pipe = tiny_pipeline("sd1")
    pipe.scheduler.register_to_config(prediction_type="v_prediction")
    with torch.no_grad():
        pipe.unet.conv_in.weight.neg_()
    pipe.save_pretrained(other)
    with pytest.warns(Notice, match="trained with prediction type epsilon, .* is used with v_prediction"):
        assert Editor.load(noise, other).model.prediction_type == "v_prediction"
    with pytest.warns(Notice, match="is used with v_prediction"):
        assert Workbench().editor(str(other), (Path(noise),)).model.prediction_type == "v_prediction"


def test_another_prediction_type_is_said(places):
    base, velocity, _ = places
    with pytest.warns(Notice, match="trained with prediction type v_prediction, .* is used with epsilon"):
        assert Editor.load(velocity, base, prediction_type="epsilon").model.prediction_type == "epsilon"
    with pytest.warns(Notice, match="v_prediction"), attach(tiny_pipeline("sd1"), velocity):
        pass


def test_what_a_file_says_without_naming_its_base_does_not_change_the_base(places):
    base, velocity, _ = places
    file = velocity / "velocity.safetensors"
    alone = file.rename(velocity.parent / "alone.safetensors")
    try:
        with pytest.warns(Notice, match="v_prediction"):
            assert Editor.load(alone, base).model.prediction_type == "epsilon"
    finally:
        alone.rename(file)


def test_the_studio_loads_the_base_anew_only_for_another_prediction_type(places):
    base, velocity, noise = map(str, places)
    bench = Workbench(base)
    plain = bench.editor(base, ()).model
    assert bench.editor(base, (Path(noise),)).model is plain
    assert bench.editor(base, (Path(velocity),)).model.prediction_type == "v_prediction"
    assert bench.editor(base, ()).model.prediction_type == "epsilon"


def test_the_studio_drags_with_an_inpainting_base_as_the_command_does(tmp_path):
    """The command that its page shows took it, the studio refused it; all else refuses it there too."""
    tiny_inpainting_pipeline("sd1").save_pretrained(tmp_path / "inpainting")
    bench, base = Workbench(), str(tmp_path / "inpainting")
    for _ in range(2):
        assert bench.editor_of(DragConfig(Path("a.png"), (), (), pretrained_model_name_or_path=base)).model.inpainting
        with pytest.raises(UserError, match="is an inpainting model"):
            bench.editor_of(PhotoConfig(Path("a.png"), "a cat", pretrained_model_name_or_path=base))
