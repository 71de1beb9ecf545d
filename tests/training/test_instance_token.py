"""A trigger token of single-image training: learned in the text encoders' vocabularies, saved beside the LoRA."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from personalize.adapters.adapter import Adapter
from personalize.adapters.apply import applied
from personalize.adapters.subjects import read_trigger
from personalize.adapters.textual_inversion import initial_embeddings
from personalize.editing.config import Sampling
from personalize.editing.editor import Editor
from personalize.errors import UserError
from personalize.formats.training_notes import training_notes
from personalize.models.stable_diffusion import StableDiffusion
from personalize.training import checkpoints
from personalize.training.batched_adapters import check_batchable
from personalize.training.config import SingleImageConfig
from personalize.training.single_image import idle_parts, learn, single_image_run
from personalize.training.validation import draw
from tests.support.runs import SMALL, pixels, same
from tests.support.tiny import tiny

CAPTION = "a photo of a <rex> dog"
TOKEN = replace(SMALL, instance_token="<rex>", text_embedding_lr=5e-3, max_train_samples=4)


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_the_token_is_learned_in_every_text_encoder_and_travels(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    tables = [encoder.get_input_embeddings() for encoder in model.text_encoders]
    tokenizers = model.tokenizers
    with torch.no_grad():
        before = model.prompts(["a photo of a dog"]).embeds
        start = initial_embeddings(model, read_trigger("<rex> dog", [CAPTION]))
    with single_image_run(model, pixels(), CAPTION, TOKEN) as run:
        assert "embeds" not in run.objective.trainable()
        list(run.steps())
        adapter = run.adapter()
    assert model.tokenizers is tokenizers and torch.equal(model.prompts(["a photo of a dog"]).embeds, before)
    assert [encoder.get_input_embeddings() for encoder in model.text_encoders] == tables
    assert adapter.concepts["<rex>"].keys() == start.keys() and len(start) == len(tables)
    for encoder, rows in adapter.concepts["<rex>"].items():  # four updates at 5e-3: each entry has moved, a little
        moved = (rows - start[encoder]).abs()
        assert rows.shape == start[encoder].shape and moved.min() > 0 and moved.max() < 0.021
    loaded = Adapter.load(adapter.save(tmp_path / "rex"))
    assert same(loaded, adapter) and all(
        torch.equal(rows, loaded.concepts["<rex>"][encoder]) for encoder, rows in adapter.concepts["<rex>"].items()
    )
    assert loaded.source is not None
    with applied(model, loaded), torch.no_grad():
        assert (model.prompts([CAPTION], (64, 64)).embeds - loaded.source["embeds"]).abs().max() < 1e-5
    assert len(list((tmp_path / "rex").glob("*rex*.safetensors"))) >= 2  # the graphical programs' and diffusers'
    assert "`<rex>`" in (tmp_path / "rex" / "README.md").read_text(encoding="utf-8")
    assert any("<rex>" in note for note in training_notes(loaded.info))


def test_edits_name_the_subject_by_its_token(model: StableDiffusion) -> None:
    editor = Editor(model, learn(model, pixels(), CAPTION, TOKEN))
    sampling = Sampling(2, size=(64, 64))
    one = editor.edit("a <rex> dog on a beach", seeds=[0], sampling=sampling)[0]
    assert one.tobytes() != editor.edit("a dog on a beach", seeds=[0], sampling=sampling)[0].tobytes()


BOTH = {"train_text_encoder": True, "proportion_empty_prompts": 0.5}


@pytest.mark.parametrize("more", [{}, pytest.param(BOTH, marks=pytest.mark.slow, id="with text encoders and dropout")])
def test_layouts_previews_and_resumption_change_nothing(more: dict, model: StableDiffusion, tmp_path: Path) -> None:
    settings = replace(TOKEN, max_train_samples=6, **more)
    whole = learn(model, pixels(), CAPTION, settings)
    with single_image_run(model, pixels(), CAPTION, replace(settings, train_batch_size=1)) as run:
        steps = run.steps()
        next(steps)
        assert len(draw(run, "a <rex> dog", count=1, steps=1)) == 1  # the token is there, and is not added twice
        run.save_checkpoint(tmp_path)
    with single_image_run(model, pixels(), CAPTION, replace(settings, train_batch_size=1)) as run:
        run.resume(checkpoints.load(tmp_path / "checkpoint-1"))
        list(run.steps())
        other = run.adapter()
    rows = [adapter.concepts["<rex>"]["text_encoder"] for adapter in (whole, other)]
    assert (rows[0] - rows[1]).abs().max() <= 1e-5  # the rounding of other batches
    assert max(float((whole.lora[key] - other.lora[key]).abs().max()) for key in whole.lora) <= 1e-5
    with single_image_run(model, pixels(), CAPTION.replace("dog", "cat"), settings) as run:
        with pytest.raises(UserError):
            run.resume(checkpoints.load(tmp_path / "checkpoint-1"))


def test_the_text_encoders_stay_for_the_updates(model: StableDiffusion) -> None:
    assert idle_parts(model, TOKEN) == [model.vae]
    with single_image_run(model, pixels(), CAPTION, replace(TOKEN, offload=True)) as run:
        assert not any(encoder in model.offload for encoder in model.text_encoders)
        assert run.objective.trainable()["rows.0"].requires_grad


def test_what_cannot_work_is_said(model: StableDiffusion) -> None:
    with pytest.raises(UserError, match="does not say <rex>: .*'a photo of a <rex> dog'"):
        read_trigger("<rex>", ["a photo of a <rex> cat", "a dog"])
    with pytest.raises(UserError, match="say what <rex> is"):
        read_trigger("<rex>", ["a photo of a <rex>"])
    with pytest.raises(UserError, match="cannot be a token"):
        read_trigger("rex", ["a photo of rex dog"])
    assert read_trigger("<rex>", ["<rex>, a photo", "a <rex> dog."]).noun == "dog"
    assert read_trigger("<rex> coffee cup", ["a <rex> cup"]).noun == "coffee cup"
    with pytest.raises(UserError, match="text_embedding_lr"):
        replace(TOKEN, text_embedding_lr=0.0)
    with pytest.raises(UserError, match="instance_token"):
        check_batchable(TOKEN)
    with pytest.raises(UserError, match="does not say <rex>"), single_image_run(model, pixels(), "a dog", TOKEN):
        pass


def test_standalone_saves_no_source_embedding(model: StableDiffusion) -> None:
    adapter = learn(model, pixels(), CAPTION, replace(TOKEN, standalone=True))
    assert adapter.source is None and adapter.concepts["<rex>"] and SingleImageConfig().instance_token is None
