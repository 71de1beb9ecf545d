"""A checkpoint's folder is an adapter folder: it can be edited with, verified and loaded elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from personalize.adapters.adapter import Adapter
from personalize.cli.checks import check_adapters
from personalize.editing.config import EditStrengths
from personalize.editing.editor import Editor
from personalize.editing.stored_strengths import remember
from personalize.formats.verification import verify_folder
from personalize.training import checkpoints
from personalize.training.multi_concept import multi_concept_run
from personalize.training.single_image import single_image_run
from tests.support.runs import CAPTION, SMALL, pixels, same
from tests.support.tiny import tiny_sd1
from tests.training.test_multi_concept_run import EXAMPLES, PICTURE
from tests.training.test_multi_concept_run import SMALL as SMALL_PETS


@pytest.mark.parametrize("kind", ["single_image", pytest.param("multi_concept", marks=pytest.mark.slow)])
def test_a_checkpoint_is_an_adapter_folder_of_what_was_learned_so_far(tmp_path: Path, kind: str):
    model = tiny_sd1()
    if kind == "single_image":
        context = single_image_run(model, pixels(), CAPTION, SMALL)
    else:
        context = multi_concept_run(model, PICTURE, SMALL_PETS, class_images=EXAMPLES)
    with context as run:
        next(run.steps())
        folder = run.save_checkpoint(tmp_path)
        learned = run.adapter()
    check_adapters([folder])
    loaded = Adapter.load(folder)
    assert same(loaded, learned) and loaded.info["updates"] == 1
    assert set(loaded.concepts) == set(learned.concepts)
    assert verify_folder(folder, model).ok
    editor = Editor(model, loaded)
    with editor:
        picture = editor.edit(learned.info["caption"], seeds=[0])[0]
    assert picture.size == editor.size[::-1]
    remember(folder, "a cat", EditStrengths(1.0, 1.2), 0, {"score": 1.0})  # as `edit --auto` does
    assert checkpoints.load(folder).update == 1  # and it is still a checkpoint
