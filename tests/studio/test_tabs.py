"""What the tabs make of their fields, without a browser."""

from __future__ import annotations

import os
import shlex
from inspect import signature
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from personalize.errors import UserError
from personalize.io.provenance import read_marks
from personalize.studio.folder import Folder
from personalize.studio.jobs import Job, JobQueue

gr = pytest.importorskip("gradio")


from personalize.studio import drag, edit, edit_pictures, learn, page, photo  # noqa: E402
from personalize.studio.actions import Workbench  # noqa: E402
from personalize.studio.learn_words import ONE, words_of  # noqa: E402
from personalize.studio.parts import Studio, address, data_url, drawn_on, page_of  # noqa: E402


def values(fields):
    """What the fields hold at first."""
    return {name: field.value for name, field in fields.items()}


def output_dir(command):
    return next(word for word in shlex.split(command) if word.startswith("--output_dir="))


def test_two_jobs_that_wait_have_folders_of_their_own(studio, tmp_path):
    drags = [drag.start_fill(studio, {}, f"64,64 > {to}", ("cat.png", "", "Move it as a whole", 0, 4, 42))
             for to in ("80,64", "64,80")]  # fmt: skip
    assert [problem for problem, _ in drags] == ["", ""]
    assert [output_dir(command) for _, command in drags] == [
        "--output_dir=studio/drag-001", "--output_dir=studio/drag-002"
    ]  # fmt: skip
    problem, _ = drag.start_fill(studio, {}, "", ("cat.png", "", "Move it as a whole", 0, 4, 42))
    assert "no pair of points" in problem
    assert not (tmp_path / "studio" / "drag-003").exists(), "what is refused leaves no folder"


def board(path, mask=None, points=()):
    """What a canvas says that shows `path`."""
    return {"picture": address(path), "masks": [mask], "points": [list(point) for point in points]}


def learn_fields(studio, **more):
    fields = {}
    with gr.Blocks():
        learn.more_fields(studio, fields)
    return values(fields) | {"mode": ONE, "caption": "a cat", "extra": [], "board": None} | more


def test_what_was_drawn_on_another_picture_is_left_out(studio):
    blank = data_url(Image.new("RGB", (128, 128), "white"))
    fields = {}
    with gr.Blocks():
        photo.settings(fields)
    given = values(fields) | {"source": "a cat", "target": "a dog", "chips": None, "picture": "cat.png"}
    given |= {"board": board("cat.png", blank)}
    assert "--mask=studio/masks-001/mask.png" in photo.words_of(studio, given)
    given |= {"picture": "beach.png"}
    assert not [word for word in photo.words_of(studio, given) if word.startswith("--mask")]

    given = learn_fields(studio, name="my-cat", pictures=["cat.png"], board=board("cat.png", blank))
    assert "--instance_mask=studio/masks-002/mask-1.png" in words_of(studio, given)
    given |= {"pictures": ["beach.png"]}
    assert not [word for word in words_of(studio, given) if word.startswith("--instance_mask")]

    drawn = board("cat.png", blank, [(64, 64), (80, 64)])
    how = ("", "Move it as a whole", 0, 4, 42)
    assert "--mask=studio/masks-003/mask.png" in drag.words_of(studio, drawn, ("cat.png", *how))
    with pytest.raises(UserError, match="no pair of points"):
        drag.words_of(studio, drawn, ("beach.png", *how))
    message, command = drag.start_fill(studio, drawn, "10,20 > 40,20", ("beach.png", *how))
    assert message == "" and "--from=10,20" in command and "--mask" not in command, "typed points are of this picture"


def test_a_mask_stays_when_its_picture_is_written_again(studio, tmp_path):
    drawn = board("cat.png", "mask")
    os.utime(tmp_path / "cat.png", (1, 1))
    assert drawn_on(drawn, Path("cat.png")) == drawn
    assert drawn_on(drawn, Path("beach.png")) == drawn_on(None, Path("cat.png")) == {}


def test_the_name_that_was_filled_in_follows_the_picture(studio, tmp_path):
    assert learn.named(studio, Path("cat.png"), "", "") == ("my-cat", "my-cat")
    assert learn.named(studio, Path("beach.png"), "my-cat", "my-cat") == ("my-beach", "my-beach")
    assert learn.named(studio, Path("beach.png"), "mine", "my-cat") == ("mine", "my-cat"), "what the user wrote stays"
    assert learn.named(studio, Path("beach.png"), "my-cat", "") == ("my-cat", "")
    (tmp_path / "my-cat").mkdir()
    assert learn.named(studio, Path("cat.png"), "my-cat", "my-cat") == ("my-cat-2", "my-cat-2")


def test_an_adapter_is_not_replaced_by_the_next_one(studio, tmp_path):
    given = learn_fields(studio, pictures=["cat.png"], name="my-cat", samples=8)
    assert learn.start_run(studio, given)[0] == ""
    message, _ = learn.start_run(studio, given | {"pictures": ["beach.png"], "name": "./my-cat"})
    assert "my-cat belongs to a training that runs or waits: write another name" in message
    assert learn.named(studio, Path("cat.png"), "", "")[0] == "my-cat-2"
    studio.queue.cancel_waiting()
    (tmp_path / "my-cat").mkdir()
    assert learn.start_run(studio, given)[0] == "", "a folder without an adapter is begun anew"
    studio.queue.cancel_waiting()
    (tmp_path / "my-cat" / "adapter.json").write_text("{}")
    with pytest.raises(UserError, match="my-cat holds an adapter already.*write another name"):
        words_of(studio, given)


def test_the_history_brings_back_how_a_picture_was_mixed(studio, tmp_path):
    with gr.Blocks():
        fields = edit.make_fields(studio)
    given = values(fields) | {"adapter": "x", "prompt": "a dog", "dial_across": "gamma", "values_across": "0.6, 0.9"}
    (tmp_path / "x").mkdir()
    entry = {"alpha": 1.0, "beta": 1.0, "gamma": 0.6, "forget": "none", "strength": 1.0, "seed": 0, "file": "edit.png"}
    plain = entry | {"gamma": None, "alpha": 0.7, "beta": 1.3}
    job = Job("edit", "Edit", lambda job: None, inputs=given)
    job.result = {"folder": tmp_path, "entries": [entry, plain]}
    queue = SimpleNamespace(history=lambda kind: [job])
    by_gamma, by_projection = (edit.words_of(studio, values, False) for _, _, values in edit_pictures.history(queue))
    assert "--gamma=0.6" in by_gamma and not [word for word in by_gamma if word.startswith(("--alpha", "--beta"))]
    assert {"--alpha=0.7", "--beta=1.3"} < set(by_projection)
    assert "--seed=0" in edit.words_of(studio, given | {"seed": None}, True)  # a field that was emptied


@pytest.mark.parametrize("forget", ["none", "nodecoder", "nodecoder=0.75", "nodecoder=0.5+noencoder=0.5"])
def test_the_history_brings_back_what_was_forgotten(studio, tmp_path, forget):
    """Of a search, which joins rules with a share each: such a picture broke the whole history."""
    given = grid_fields(tmp_path, ("–", ""), ("–", ""), rule="nokv")
    entry = {"alpha": 0.8, "beta": 1.2, "gamma": None, "forget": forget, "strength": 1.0, "seed": 0, "file": "edit.png"}
    job = Job("edit", "Edit", lambda job: None, inputs=given)
    job.result = {"folder": tmp_path, "entries": [entry]}
    ((_, _, fields),) = edit_pictures.history(SimpleNamespace(history=lambda kind: [job]))
    said = [word for word in edit.words_of(studio, fields, False) if word.startswith("--forget")]
    assert said == [f"--forget={forget}"] * (forget != "none")


def test_the_search_is_told_with_which_learned_picture_it_compares(studio, tmp_path):
    """An adapter of several captions was always compared with the picture of its first."""
    given = grid_fields(tmp_path, ("–", ""), ("–", ""))
    assert not [word for word in edit.words_of(studio, given, True) if "source_image" in word]
    chosen = given | {"source_image": "beach.png"}
    words = edit.words_of(studio, chosen, True)
    assert "--source_image=beach.png" in words and "--auto" in words
    assert not [word for word in edit.words_of(studio, chosen, False) if "source_image" in word], "of the search alone"
    with pytest.raises(UserError, match="gone"):
        edit.words_of(studio, given | {"source_image": "gone.png"}, True)


def grid_fields(tmp_path: Path, across: tuple[str, str], down: tuple[str, str], **more: object):
    with gr.Blocks():
        fields = values(edit.make_fields(Studio(Folder(tmp_path), JobQueue(), Workbench(None))))
    (tmp_path / "x").mkdir(exist_ok=True)
    chosen = {"dial_across": across[0], "values_across": across[1], "dial_down": down[0], "values_down": down[1]}
    return fields | chosen | {"adapter": "x", "prompt": "a dog"} | more


def test_each_picture_of_two_dials_is_in_the_cell_of_its_own_values(studio, tmp_path):
    """The pictures of the rule none went all into the cell of 1, and the others stayed empty."""
    given = grid_fields(tmp_path, ("forgotten", "0.2, 1"), ("rule", "none, decoder"), count=2)
    words = edit.words_of(studio, given, False)
    forgotten = [word.removeprefix("--forget=") for word in words if word.startswith("--forget=")]
    assert forgotten == ["none", "none", "decoder=0.8", "decoder"]
    entries = [{"file": f"{n}.png", "prompt": "a dog"} for n in range(8)]  # two seeds of each
    for number, entry in enumerate(entries):
        Image.new("RGB", (8, 8), (number * 30, 0, 0)).save(tmp_path / entry["file"])
    drawn = edit_pictures.two_dials(edit.dials_of(given), {"entries": entries}, tmp_path)
    assert read_marks(drawn).source_type, "what a model made says so"
    sheet = Image.open(drawn).convert("RGB")
    shown = {number for number in range(8) if (np.asarray(sheet) == (number * 30, 0, 0)).all(-1).sum() > 100}
    assert shown - {0} == {2, 4, 6}, "the first seed of each"


def test_no_dial_of_a_grid_is_left_out_silently(studio, tmp_path):
    by_gamma = next(text for text, way in edit_pictures.MIXES.items() if way == "subtraction")
    words = edit.words_of(studio, grid_fields(tmp_path, ("alpha", "0.7, 1"), ("–", ""), mix=by_gamma), False)
    assert {"--alpha=0.7", "--alpha=1"} < {*words} and "--gamma" not in " ".join(words)
    with pytest.raises(UserError, match="the dial alpha has no effect beside gamma"):
        edit.dials_of(grid_fields(tmp_path, ("alpha", "0.7, 1"), ("gamma", "0.6")))
    with pytest.raises(UserError, match="choose a rule under Forget"):
        edit.dials_of(grid_fields(tmp_path, ("forgotten", "0.2, 1"), ("–", ""), rule="none"))


def test_changes_at_swapped_words_alone_need_a_swapped_word(studio):
    """The photo was edited everywhere."""
    fields = {}
    with gr.Blocks():
        photo.settings(fields)
    given = values(fields) | {"source": "a cat", "target": "", "picture": "cat.png", "board": None, "local": True}
    given |= {"chips": {"swaps": {"cat": "dog"}}}
    assert "--local=cat=dog" in photo.words_of(studio, given)
    for none in ({"target": "a dog"}, {"chips": {"weights": {"cat": 2}}}):
        with pytest.raises(UserError, match="no word is swapped"):
            photo.words_of(studio, given | none)


def test_words_of_another_photo_are_left_out(studio):
    """The maps of the photo before were shown as where the words look in this one."""
    with gr.Blocks() as made:
        tab = photo.build(studio)
    (chips,) = (one for one in made.blocks.values() if getattr(one, "elem_id", "") == "photo-chips")
    chosen = (tab.fields["picture"]._id, "change")
    (change,) = (one for one in made.fns.values() if chosen in one.targets and one.outputs == [chips])
    assert change.fn is not None and change.fn().props == {"words": []}


def test_every_page_is_told_apart(studio):
    """Gradio gives a handler the request where its parameters ask for it."""
    from gradio.helpers import special_args

    made = page.build(studio)
    asked = [one.fn for one in made.fns.values() if one.fn is not None and "request" in signature(one.fn).parameters]
    assert len(asked) == 5
    for function in asked:
        request = SimpleNamespace(session_hash="of this page")
        assert special_args(function, ["drawn", "lines"], request=request)[0] == [request, "drawn", "lines"]
        assert page_of(request) == "of this page"
