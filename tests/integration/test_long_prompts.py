"""Captions and prompts of over 75 tokens, in training, drawing, pipelines, edits of photos and drags."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from personalize.adapters.adapter import Adapter
from personalize.adapters.subjects import Subject
from personalize.adapters.textual_inversion import initial_embeddings, installed_tokens
from personalize.editing.attach import Attached
from personalize.editing.config import DynamicSettings, Sampling
from personalize.editing.drag.config import DragSettings
from personalize.editing.editor import Editor
from personalize.editing.photo_settings import PhotoSettings
from personalize.editing.prompt_to_prompt.control import align
from personalize.editing.real_image import edit_photo
from personalize.editing.real_image_settings import EditRequest
from personalize.models.prompts import tokenize_prompt
from personalize.models.stable_diffusion import StableDiffusion
from personalize.sampling.config import NullTextSettings
from personalize.sampling.denoise import Edit, denoise, initial_latents
from personalize.sampling.schedule import make_schedule
from personalize.training import single_image as single_image_module
from personalize.training.batched_adapters import learn_batched
from personalize.training.config import MultiConceptConfig, SingleImageConfig
from personalize.training.data.concepts import ClassImage, ConceptPicture
from personalize.training.multi_concept import multi_concept_run
from personalize.training.single_image import learn, single_image_run
from tests.models.test_token_ids import independent
from tests.support.photos import photo
from tests.support.runs import SMALL, pixels, same
from tests.support.tiny import NAMES, tiny

LONG = "a red cat on the beach " * 13  # 78 tokens
DOG, FOX = LONG + "and my dog", LONG + "and my fox"
SIZE = (32, 32)


@pytest.fixture(autouse=True)
def few_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """One in sixteen: adding them takes longest of all here."""
    everywhere = single_image_module.module_names
    monkeypatch.setattr(single_image_module, "module_names", lambda *wanted: everywhere(*wanted)[::16])


@pytest.fixture(scope="module")
def model() -> StableDiffusion:
    return tiny("sd1")


@pytest.mark.parametrize("name", NAMES)
def test_a_long_prompt_is_drawn_as_diffusers_draws_its_embeddings(name: str) -> None:
    """Against `prompt_embeds` computed by transformers alone; 3e-5 on latents of size up to 20.

    The negative prompt has one chunk.
    """
    base = tiny(name)
    noise = initial_latents(base, [3], SIZE)
    given, negative = independent(base, DOG, 2), independent(base, "a blue fox", 1)
    call = {"prompt_embeds": given[0], "negative_prompt_embeds": negative[0].repeat(1, 2, 1)}
    if given[1] is not None:
        call |= {"pooled_prompt_embeds": given[1], "negative_pooled_prompt_embeds": negative[1]}
    pipe = base.pipeline()
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(**call, latents=noise.clone(), output_type="latent", num_inference_steps=3, guidance_scale=3.0,
                    height=32, width=32).images  # fmt: skip
    edit = Edit(base.prompts([DOG], SIZE), base.prompts(["a blue fox"], SIZE), guidance_scale=3.0)
    found = denoise(base, noise, edit, make_schedule(base, 3))
    torch.testing.assert_close(found, expected, atol=3e-5, rtol=0)


def test_words_behind_the_75th_token_are_drawn_also_against_a_longer_negative_prompt(model: StableDiffusion) -> None:
    editor, sampling = Editor(model), Sampling(steps=2, size=SIZE)
    for negative in ("", LONG * 2):
        dog, fox = (editor.base(text, negative_prompt=negative, sampling=sampling)[0] for text in (DOG, FOX))
        assert np.asarray(dog).tolist() != np.asarray(fox).tolist()


@pytest.mark.parametrize(
    ("name", "caption", "prompt"),
    [("sd1", DOG, "a fox"), ("sd1", "a fox", DOG), ("sdxl", DOG, LONG * 2),
     *(pytest.param("sdxl", *pair, marks=pytest.mark.slow) for pair in ((DOG, "a fox"), ("a fox", DOG)))],
)  # fmt: skip
def test_source_embeddings_of_long_captions_are_edited_by_prompts_of_any_length(
    name: str, caption: str, prompt: str
) -> None:
    """`alpha` 1 and `beta` 0 is the source; the pipeline of `attach` draws what the editor draws."""
    base = tiny(name)
    adapter = learn(base, pixels(), caption, replace(SMALL, max_train_samples=1))
    assert adapter.source is not None and adapter.source["embeds"].shape[1] == tokenize_prompt(base, caption).length
    editor, sampling = Editor(base, adapter), Sampling(steps=2, size=(64, 64), guidance_scale=3.0)
    expected = editor.edit(prompt, alpha=0.8, beta=1.2, sampling=sampling)[0]
    found = _drawn_by_attach(base, adapter, prompt)
    assert np.abs(np.asarray(found, np.int16) - np.asarray(expected, np.int16)).max() <= 1


def _drawn_by_attach(base: StableDiffusion, adapter: Adapter, prompt: str) -> Image.Image:
    pipe = base.pipeline()
    pipe.set_progress_bar_config(disable=True)
    with adapter.apply(base):
        attached = Attached(base, adapter)
        inputs = attached.inputs(prompt, alpha=0.8, beta=1.2)
        return pipe(**inputs, latents=initial_latents(base, [0], (64, 64)), num_inference_steps=2, guidance_scale=3.0,
                    height=64, width=64).images[0]  # fmt: skip


def test_words_behind_the_75th_token_are_learned(model: StableDiffusion) -> None:
    dog, fox = (learn(model, pixels(), caption, replace(SMALL, max_train_samples=1)) for caption in (DOG, FOX))
    assert not same(dog, fox)


def test_adapters_learned_together_equal_those_learned_alone_whatever_their_lengths(model: StableDiffusion) -> None:
    """The long one is alone of its kind, hence bit for bit; 1e-5 on the embeddings of the others."""
    config = replace(SMALL, max_train_samples=1)
    pictures = [(pixels(), "a cat"), (pixels(), DOG), (pixels(), "a fox")]
    for (adapter, _), (picture, caption) in zip(learn_batched(model, pictures, config), pictures, strict=True):
        alone = learn(model, picture, caption, config)
        assert adapter.source is not None and alone.source is not None
        torch.testing.assert_close(adapter.source["embeds"], alone.source["embeds"], atol=1e-5, rtol=0)


def test_a_short_caption_is_read_alike_alone_and_beside_a_long_one(model: StableDiffusion) -> None:
    """With trained text encoders captions are encoded anew for each batch; 1e-6: batches round differently."""
    config = SingleImageConfig(rank=2, max_train_samples=2, samples_per_update=2, train_text_encoder=True)
    with single_image_run(model, pixels().repeat(2, 1, 1, 1), ["a cat", DOG], config) as run:
        both = run.objective.conditioning(torch.tensor([0, 1])).embeds[:1]
        alone = run.objective.conditioning(torch.tensor([0])).embeds
    assert alone.shape[1] == 154
    torch.testing.assert_close(alone, both, atol=1e-6, rtol=0)


CAT = Subject("<cat1>", "cat", 2)


@pytest.mark.parametrize(
    "prompt", [LONG + "and a photo of a <cat1> cat",
               pytest.param(LONG[:-40] + "and a photo of a <cat1> cat", marks=pytest.mark.slow)],
)  # fmt: skip
def test_concepts_behind_the_75th_token_are_learned_where_they_stand(model: StableDiffusion, prompt: str) -> None:
    """The second prompt is of one chunk, but not with the longest prefix of a view.  All batches have equal shapes."""
    picture = ConceptPicture(Image.new("RGB", (64, 64), (200, 30, 90)), (CAT,), prompt)
    classes = [ClassImage("a cat", Image.new("RGB", (64, 64), (10, 90, 90)))]
    config = MultiConceptConfig(rank=2, samples_per_update=2, max_train_steps=1)
    losses = []
    for batch in (1, 2):
        with multi_concept_run(model, picture, replace(config, train_batch_size=batch), class_images=classes) as run:
            nouns = run.dataset.instance(0, 0)["nouns"]  # pyright: ignore[reportAttributeAccessIssue]
            assert nouns.shape == (1, 154) and nouns.sum() == 1
            losses.append([float(report.losses["loss"]) for report in run.steps()])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_words_correspond_across_chunks(model: StableDiffusion) -> None:
    """A word put in pushes the last words of the first chunk into the second; they keep the maps of their own."""
    text = "a cat " * 37 + "on the beach"
    source, target = tokenize_prompt(model, text), tokenize_prompt(model, "my red " + text)
    found = align(source, target, 154)
    assert found.mode == "refine" and found.own.nonzero()[:, 0].tolist() == [1, 2]
    place = found.matrix.argmax(0)
    assert (source.find("beach"), target.find("beach")) == ([(79,)], [(81,)])
    assert place[81] == 79 and place[78] == 74 and place[75] == 73 and place[0] == 0 and place[77] == 77
    assert torch.equal(found.matrix.sum(0), 1 - found.own)
    swapped = align(source, tokenize_prompt(model, text.replace("beach", "mountain")), 154)
    assert swapped.mode == "replace" and torch.equal(swapped.matrix, torch.eye(154))


def test_one_prompt_of_one_chunk_and_one_of_two(model: StableDiffusion) -> None:
    source, target = tokenize_prompt(model, "a cat " * 37), tokenize_prompt(model, "a red " + "a cat " * 37)
    place = align(source, target, 154).matrix.argmax(0)
    assert target.places[-2:] == (78, 79) and place[78] == 74 and place[79] == 75


SETTINGS = PhotoSettings(steps=2, null_text=NullTextSettings(iterations=1), resolution=32)


@pytest.mark.parametrize(
    "settings", [SETTINGS, replace(SETTINGS, inversion="null-text"), replace(SETTINGS, controller="mutual"),
                 pytest.param(replace(SETTINGS, dynamic=DynamicSettings(updates=1)), marks=pytest.mark.slow)],
    ids=["direct", "null-text", "mutual", "dynamic"],
)  # fmt: skip
@pytest.mark.parametrize(
    "source", [LONG + "and my cat", pytest.param("my cat", marks=pytest.mark.slow)], ids=["long", "short"]
)
def test_photos_are_edited_by_words_behind_the_75th_token(
    model: StableDiffusion, settings: PhotoSettings, source: str
) -> None:
    found = edit_photo(model, photo(), source, EditRequest(DOG, local=(("cat", "dog"),)), settings)
    other = edit_photo(model, photo(), source, EditRequest(FOX, local=(("cat", "fox"),)), settings)
    assert np.asarray(found.image).tolist() != np.asarray(other.image).tolist()
    assert found.trajectory.conditioning.embeds.shape[1] == 154


def test_pictures_are_dragged_under_a_long_prompt(model: StableDiffusion) -> None:
    """The empty prompt gives another picture: the words are read."""
    points, settings = [(20, 20), (40, 20)], DragSettings(method="latents", steps=2, strength=1.0)
    mask = Image.new("L", (64, 64))
    mask.paste(255, (12, 12, 30, 30))
    dog, nothing = (Editor(model).drag(points, photo(64, 64), mask=mask, prompt=text, settings=settings).image.tobytes()
                    for text in (DOG, ""))  # fmt: skip
    assert dog != nothing


def test_a_learned_token_of_several_vectors_is_drawn_behind_the_75th_token(model: StableDiffusion) -> None:
    with installed_tokens(model, {CAT.token: initial_embeddings(model, CAT)}):
        assert tokenize_prompt(model, LONG + "<cat1> cat").find("<cat1>") == [(81, 82)]
        assert model.prompts([LONG + "<cat1> cat"]).embeds.shape == (1, 154, 32)
