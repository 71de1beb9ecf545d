"""Pictures while training: those that inference gives, without a trace in the run, and never its end."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from personalize.adapters.adapter import Adapter
from personalize.adapters.subjects import Subject
from personalize.editing.config import Sampling
from personalize.editing.editor import Editor
from personalize.io.images import psnr, to_image, to_pixels
from personalize.training import validation
from personalize.training.config import MultiConceptConfig
from personalize.training.data.buckets import fit
from personalize.training.data.concepts import ConceptPicture
from personalize.training.multi_concept import multi_concept_run
from personalize.training.single_image import learn, single_image_run
from personalize.training.validation import draw, preview, save_with_preview, validate
from tests.support.runs import CAPTION, SMALL, pixels, same
from tests.support.tiny import tiny_sd1

PROMPT = "a photo of a cat in snow"


def options(folder: Path) -> SimpleNamespace:
    return SimpleNamespace(output_dir=folder, validation_prompt=PROMPT, num_validation_images=2, preview_steps=1)


@pytest.mark.parametrize(
    "text", [pytest.param(False, id="source", marks=pytest.mark.slow), pytest.param(True, id="text_encoders")]
)
def test_they_are_what_inference_gives_and_the_run_does_not_notice(text: bool, tmp_path: Path) -> None:
    model, settings = tiny_sd1(), replace(SMALL, max_train_samples=2, train_text_encoder=text)
    plain = learn(model, pixels(), CAPTION, settings)
    with single_image_run(model, pixels(), CAPTION, settings) as run:
        steps = run.steps()
        next(steps)
        drawn, adapter = draw(run, PROMPT, count=1, steps=1), run.adapter()
        list(steps)
        assert same(run.adapter(), plain)
    expected = Editor(model, adapter).edit(PROMPT, seeds=[0], sampling=Sampling(1))
    assert np.array_equal(np.asarray(drawn[0]), np.asarray(expected[0]))


def test_they_are_written_and_shown_to_trackers(tmp_path: Path) -> None:
    logged = {}
    tracker = SimpleNamespace(name="tensorboard", log_images=lambda values, **extra: logged.update(values, **extra))
    with single_image_run(tiny_sd1(), pixels(), CAPTION, SMALL) as run:
        run.accelerator.trackers = [tracker]
        next(run.steps())
        paths = validate(run, options(tmp_path))
    assert [path.name for path in paths] == ["000001-0.png", "000001-1.png"] and all(p.is_file() for p in paths)
    assert logged["validation"].shape == (2, 64, 64, 3) and (logged["step"], logged["dataformats"]) == (1, "NHWC")


def test_a_failed_one_is_a_warning_and_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, settings = tiny_sd1(), replace(SMALL, max_train_samples=2)
    plain = learn(model, pixels(), CAPTION, settings)

    def fail(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("no memory\nat all")

    monkeypatch.setattr(validation.Editor, "edit", fail)
    with single_image_run(model, pixels(), CAPTION, settings) as run:
        steps = run.steps()
        next(steps)
        with pytest.warns(UserWarning, match="update 1: no validation pictures, training goes on: no memory$"):
            assert validate(run, options(tmp_path)) == []
        list(steps)
        assert same(run.adapter(), plain)


def test_the_adapter_is_saved_before_its_preview_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_sd1()
    adapter = learn(model, pixels(), CAPTION, replace(SMALL, max_train_samples=1))

    def fail(*args: object, **kwargs: object) -> None:
        assert same(Adapter.load(tmp_path / "mine"), adapter)  # it is there already
        raise torch.OutOfMemoryError("no memory\nat all")

    monkeypatch.setattr(validation.Editor, "reconstruct", fail)
    with pytest.warns(UserWarning, match="mine is saved, without a preview: no memory$"):
        assert save_with_preview(model, adapter, pixels(), tmp_path / "mine", steps=1) == {}
    assert same(Adapter.load(tmp_path / "mine"), adapter)
    assert "No preview was drawn: no memory" in (tmp_path / "mine" / "README.md").read_text()
    monkeypatch.undo()
    figures = save_with_preview(model, adapter, pixels(), tmp_path / "mine", steps=1)
    assert set(figures) == {"autoencoder_db", "reconstruction_db", "standalone_gap_db"}
    card = (tmp_path / "mine" / "README.md").read_text()
    assert "reconstruction.png" in card and "No preview" not in card


@pytest.mark.parametrize(("width", "height"), [(64, 64), (64, 40), (40, 64)])
def test_figures_of_a_padded_picture_are_of_its_own_pixels(width: int, height: int) -> None:
    """The padding is never learned: what is drawn there says nothing of how well the picture was."""
    model = tiny_sd1()
    picture = fit(to_image(pixels()).resize((width, height)), None, 64, 32)
    own = (slice(None), slice(None), *(slice(side) for side in picture.unpadded or ()))
    adapter = learn(model, [picture], CAPTION, replace(SMALL, max_train_samples=1))
    figures, pictures = preview(model, adapter, picture, steps=1)
    drawn, coded = to_pixels(pictures["reconstruction"]), model.decode(model.encode(picture.pixels))
    assert drawn.shape == picture.pixels.shape
    assert figures["reconstruction_db"] == round(psnr(drawn[own], picture.pixels[own]), 2)
    assert figures["autoencoder_db"] == round(psnr(coded[own], picture.pixels[own]), 2)
    if picture.padding:
        assert figures["reconstruction_db"] != round(psnr(drawn, picture.pixels), 2)


@pytest.mark.parametrize("full_kv", [False, True])
def test_several_concepts_are_drawn_with_their_words(full_kv: bool) -> None:
    picture = ConceptPicture(to_image(pixels()), (Subject("<cat1>", "cat"),))
    config = MultiConceptConfig(
        rank=64 if full_kv else 2, max_train_steps=1, full_kv=full_kv, initializer_token="class",
        calibration_weight=0.0, samples_per_update=2,
    )  # fmt: skip
    model = tiny_sd1()
    with multi_concept_run(model, picture, config) as run:
        list(run.steps())
        weights = {name: value.detach().clone() for name, value in run.objective.trainable().items()}
        (drawn,) = draw(run, "a <cat1> cat", count=1, steps=1)
        assert all(torch.equal(value, weights[name]) for name, value in run.objective.trainable().items())
        adapter = run.adapter()
    (expected,) = Editor(tiny_sd1(), adapter).edit("a <cat1> cat", seeds=[0], sampling=Sampling(1))
    assert np.array_equal(np.asarray(drawn), np.asarray(expected))
