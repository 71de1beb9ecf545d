"""Progress is reported to a listener, and to nobody without one."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from personalize.adapters.merging import low_rank
from personalize.io.progress import listening, part, ticked
from personalize.sampling.config import NullTextSettings
from personalize.sampling.inversion import invert
from personalize.training.data import class_images
from personalize.training.single_image import single_image_run
from tests.support.photos import SOURCE, shared, smooth
from tests.support.runs import CAPTION, SMALL, pixels
from tests.support.tiny import tiny_sd1


def written_to(heard: list[str]):
    """A listener that writes down what it hears."""

    @contextmanager
    def listener(name: str, steps: int, done: int):
        heard.append(f"{name} {done}/{steps}")
        yield lambda note=None: heard.append(name if note is None else f"{name}: {note()}")
        heard.append(f"{name} ends")

    return listener


def test_a_listener_hears_every_part_and_step_and_nothing_afterwards():
    heard: list[str] = []
    with listening(written_to(heard)):
        invert(shared(), smooth(), SOURCE, "null-text", steps=2, null_text=NullTextSettings(iterations=1))
    names = ("Inverting", "Fitting null embeddings")
    expected = [f"{name}{end}" for name in names for end in (" 0/2", "", "", " ends")]
    assert heard == expected
    assert list(ticked([1, 2])) == [1, 2] and heard == expected


def test_names_and_listeners_end_with_their_body_also_after_an_error():
    heard: list[str] = []
    with pytest.raises(ZeroDivisionError), listening(written_to(heard)):
        with part("Outer"):
            list(ticked([0]))
            with part("Inner"):
                list(ticked([0]))
            list(ticked([0]))
        raise ZeroDivisionError
    list(ticked([0]))
    assert [line for line in heard if line.endswith("ends")] == ["Outer ends", "Inner ends", "Outer ends"]


def test_a_name_of_its_own_what_was_done_before_and_a_note_are_told():
    heard: list[str] = []
    with listening(written_to(heard)):
        assert list(ticked(iter("ab"), "Letters", total=5, done=3, note=str.upper)) == ["a", "b"]
    assert heard == ["Letters 3/5", "Letters: A", "Letters: B", "Letters ends"]


def test_a_loop_that_is_left_ends_its_part():
    heard: list[str] = []
    with listening(written_to(heard)):
        for _ in ticked(range(3), "Left"):
            break
    assert heard == ["Left 0/3"], "an unfinished step is not counted"


def test_what_a_listener_raises_ends_the_work():
    @contextmanager
    def cancelling(name: str, steps: int, done: int):
        def advance(note=None):
            raise KeyboardInterrupt

        yield advance

    begun = []
    with pytest.raises(KeyboardInterrupt), listening(cancelling):
        for item in ticked(range(3)):
            begun.append(item)
    assert begun == [0]


def test_training_says_how_far_it_is_with_its_loss_and_class_pictures_too(tmp_path):
    model, heard = tiny_sd1(), []
    with listening(written_to(heard)), single_image_run(model, pixels(), CAPTION, SMALL) as run:
        next(run.steps())
        losses = [float(report.losses["loss"]) for report in run.steps()]
    lines = [line for line in heard if line.startswith("Learning")]
    begun = lines.index("Learning 1/4")
    assert lines[0] == "Learning 0/4" and lines[-1] == "Learning ends"
    notes = lines[begun + 1 : -1]
    assert notes == [f"Learning: loss {loss:.3f}" for loss in losses]
    heard.clear()
    count = class_images.BATCH + 1
    with listening(written_to(heard)):
        class_images.from_base(model, "a photo of a cat", count, size=(64, 64), steps=2, cache=tmp_path)
    outer = [line for line in heard if line.startswith("Class pictures")]
    assert outer[0] == f"Class pictures, {class_images.BATCH} at once 0/2" and len(outer) == 4
    assert heard.count("Sampling 0/2") == 2


def test_long_work_on_files_says_how_far_it_is():
    heard: list[str] = []
    with listening(written_to(heard)):
        low_rank({"a": torch.eye(3), "b": torch.eye(2)}, 1)
    assert heard == ["Decomposing 0/2", "Decomposing", "Decomposing", "Decomposing ends"]
