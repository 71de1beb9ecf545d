"""A whole run on tiny models: reproducible, resumable to the bit, without a trace; what it leaves loads elsewhere."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from personalize.adapters.adapter import Adapter
from personalize.adapters.subjects import Subject
from personalize.adapters.textual_inversion import initial_embeddings, installed_tokens
from personalize.editing.attach import attach
from personalize.editing.config import Sampling
from personalize.editing.editor import Editor
from personalize.errors import UserError
from personalize.io.images import to_pixels
from personalize.models.stable_diffusion import StableDiffusion
from personalize.training import checkpoints
from personalize.training.concept_maps import concept_maps, map_sheet
from personalize.training.config import MultiConceptConfig
from personalize.training.data.concepts import ClassImage, ConceptDataset, ConceptPicture
from personalize.training.data.samples import SampleShard
from personalize.training.multi_concept import multi_concept_run
from tests.support.tiny import tiny, tiny_folder

CAT, DOG = Subject("<cat1>", "cat", 2), Subject("<dog1>", "dog")
SMALL = MultiConceptConfig(rank=2, max_train_steps=2, samples_per_update=2, learning_rate=1e-2,
                      token_learning_rate=1e-2)  # fmt: skip


def photo() -> Image.Image:
    image = Image.new("RGB", (90, 72), "teal")
    pen = ImageDraw.Draw(image)
    pen.ellipse((12, 20, 40, 60), "orange")
    pen.rectangle((50, 20, 76, 60), "purple")
    return image


PICTURE = ConceptPicture(photo(), (CAT, DOG))
EXAMPLES = (ClassImage("photo of a cat and dog", Image.new("RGB", (64, 64), "gray")),)


def taught(model: StableDiffusion, config: MultiConceptConfig = SMALL, **options: Any) -> Adapter:
    with multi_concept_run(model, PICTURE, config, **options) as run:
        for report in run.steps():
            assert bool(report.losses["loss"].isfinite())
        return run.adapter()


def same(a: Adapter, b: Adapter) -> bool:
    rows = [(a.lora[key], b.lora[key]) for key in a.lora]
    rows += [(a.concepts[t][k], b.concepts[t][k]) for t in a.concepts for k in a.concepts[t]]
    return all(torch.equal(*row) for row in rows)


@pytest.fixture(scope="module")
def model() -> StableDiffusion:
    return tiny("sd1")


@pytest.fixture(scope="module")
def unbroken(model: StableDiffusion) -> Adapter:
    return taught(model, class_images=EXAMPLES)


def test_a_run_changes_adapter_and_tokens_and_leaves_no_trace(model: StableDiffusion, unbroken: Adapter) -> None:
    fresh = tiny("sd1")
    for mine, other in zip((model.unet, *model.text_encoders), (fresh.unet, *fresh.text_encoders), strict=True):
        state = other.state_dict()
        assert state.keys() == mine.state_dict().keys()
        assert all(torch.equal(tensor, state[key]) for key, tensor in mine.state_dict().items())
        assert not any(p.requires_grad or p.grad is not None for p in mine.parameters())
    assert len(unbroken.lora) == 64 and unbroken.concepts["<cat1>"]["text_encoder"].shape == (2, 32)
    start = initial_embeddings(model, CAT, "ktn")["text_encoder"]
    assert bool((unbroken.concepts["<cat1>"]["text_encoder"] != start).any())
    assert unbroken.info["subjects"][0] == {"token": "<cat1>", "noun": "cat", "vectors": 2}


def test_disendiff_g_resuming_is_equal_to_the_bit(model: StableDiffusion, unbroken: Adapter, tmp_path: Path) -> None:
    torch.manual_seed(99)  # global state plays no part
    with multi_concept_run(model, PICTURE, SMALL, class_images=EXAMPLES) as run:
        next(run.steps())
        run.save_checkpoint(tmp_path)
    with multi_concept_run(model, PICTURE, SMALL, class_images=EXAMPLES) as run:
        run.resume(checkpoints.load(tmp_path / "checkpoint-1"))
        assert [report.update for report in run.steps()] == [2]
        assert same(run.adapter(), unbroken)
    with multi_concept_run(model, PICTURE, replace(SMALL, calibration_weight=0.5), class_images=EXAMPLES) as run:
        with pytest.raises(UserError, match="calibration_weight"):
            run.resume(checkpoints.load(tmp_path / "checkpoint-1"))


def noise_of(model: StableDiffusion, text: str) -> torch.Tensor:
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model.predict(latents, 500, model.prompts([text]))


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_disendiff_g_the_folder_loads_in_a_stock_pipeline_and_predicts_the_same_noise(
    name: str, model: StableDiffusion, unbroken: Adapter, tmp_path: Path
) -> None:
    text = "a <cat1> cat on the beach"
    base = model if name == "sd1" else tiny("sdxl")
    adapter = unbroken if name == "sd1" else taught(base, replace(SMALL, max_train_steps=1))
    folder = adapter.save(tmp_path / "pets")
    again = Adapter.load(folder)
    assert same(adapter, again)
    with again.apply(base), installed_tokens(base, again.concepts):
        ours = noise_of(base, text)
    assert (ours - noise_of(base, "a cat on the beach")).abs().max() > 1e-3
    other = tiny(name)
    pipe = other.pipeline()
    pipe.load_lora_weights(folder, weight_name="pytorch_lora_weights.safetensors")
    for token, stem in (("<cat1>", "cat1"), ("<dog1>", "dog1")):
        parts = {"text_encoder": pipe.text_encoder, "tokenizer": pipe.tokenizer}
        pipe.load_textual_inversion(str(folder / f"{stem}_learned_embeds.safetensors"), token=token, **parts)
        if name == "sdxl":
            parts = {"text_encoder": pipe.text_encoder_2, "tokenizer": pipe.tokenizer_2}
            pipe.load_textual_inversion(str(folder / f"{stem}_learned_embeds_2.safetensors"), token=token, **parts)
    theirs = noise_of(StableDiffusion.from_pipeline(pipe), text)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)  # fp32: LoRA sums in another order


def test_disendiff_g_weight_zero_is_custom_diffusion_whatever_the_maps_do(
    model: StableDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "personalize.training.multi_concept_objective.calibration", lambda *_: pytest.fail("maps were looked at")
    )
    adapter = taught(model, replace(SMALL, max_train_steps=1, calibration_weight=0.0))
    assert adapter.info["calibrated"] == {}


def test_full_weights_come_out_as_a_lora_with_its_residual(model: StableDiffusion) -> None:
    with multi_concept_run(model, PICTURE, replace(SMALL, full_kv=True, max_train_steps=1, rank=4)) as run:
        list(run.steps())
        adapter = run.adapter()
    assert len(adapter.lora) == 64 and adapter.rank == 4
    assert 0 < adapter.info["full_kv_residual"] < 1


def test_a_run_that_changed_nothing_says_the_rate_that_it_had(
    model: StableDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It said `learning_rate (None)` where none was given."""
    with multi_concept_run(model, PICTURE, replace(SMALL, max_train_steps=1, learning_rate=None)) as run:
        monkeypatch.setattr(run, "_any_weight_changed", lambda: False)
        with pytest.warns(UserWarning, match=r"no adapter weight changed in 1 updates: raise learning_rate \(0.0005\)"):
            list(run.steps())


def test_samples_are_keyed_by_update_and_index_and_batches_are_stratified(model: StableDiffusion) -> None:
    rows = {s.token: initial_embeddings(model, s) for s in (CAT, DOG)}
    with installed_tokens(model, rows):
        data = ConceptDataset(model, PICTURE, 64, 0, EXAMPLES)
        one, two = list(data.batches(SampleShard(4, 2), 0, 1))
        again = next(iter(ConceptDataset(model, PICTURE, 64, 0, EXAMPLES).batches(SampleShard(4, 2), 0, 1)))
    for batch in (one, two):
        assert batch["instance"].tolist() == [True, False]
        assert batch["nouns"][0].sum(-1).tolist() == [1, 1] and batch["modifiers"][0].sum(-1).tolist() == [2, 1]
        assert not bool(batch["nouns"][1].any()) and batch["texts"][1] == EXAMPLES[0].caption
    assert torch.equal(one["latents"], again["latents"]) and one["texts"] == again["texts"]
    assert not torch.equal(one["noise"], two["noise"])


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_long_captions_of_class_pictures_change_nothing_of_the_concepts(name: str) -> None:
    """The prompts got as many chunks of 75 tokens, of nothing, with start tokens that learned: alone they have one."""
    config, found = replace(SMALL, prior_loss_weight=0.0, calibration_weight=0.1), []
    for caption in ("photo of a cat and dog", "photo of a cat and dog in the park on the beach " * 10):
        classes = [replace(EXAMPLES[0], caption=caption)]
        with multi_concept_run(tiny(name), PICTURE, config, class_images=classes) as run:
            (batch,) = next(run.dataset.updates(run.shard, 0, 1))
            assert batch["instance"].tolist() == [True, False]
            terms = run.objective(batch)
            grads = torch.autograd.grad(terms.total, [*run.objective.trainable().values()])
            found.append((batch["nouns"].shape[-1], terms.parts, torch.cat([grad.flatten() for grad in grads])))
    (short, plain, gradient), (long, beside, other) = found
    assert (short, long) == (77, 154)
    assert all(float(beside[key]) == pytest.approx(float(value), rel=1e-4) for key, value in plain.items())
    assert float((other - gradient).norm() / gradient.norm()) < 1e-3  # scaling maps to [0, 1] magnifies rounding


def test_masks_travel_with_the_picture(model: StableDiffusion) -> None:
    masks = tuple(Image.new("L", (90, 72), 255 - 100 * index) for index in range(2))
    picture = replace(PICTURE, image=photo(), masks=masks)
    with multi_concept_run(model, picture, replace(SMALL, max_train_steps=1, mask_weight=0.1)) as run:
        assert {"calibration", "anchoring"} <= next(run.steps()).losses.keys()


def test_a_damaged_class_picture_is_found_before_the_first_update(model: StableDiffusion, tmp_path: Path) -> None:
    """Its header, by which its size is known, may be whole."""
    noise = Image.effect_noise((64, 64), 50)
    noise.save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:1500])
    classes = [ClassImage("a cat", tmp_path / name) for name in ("whole.png", "cut.png")]
    with (
        pytest.raises(UserError, match=r"cut\.png is damaged or truncated"),
        multi_concept_run(model, PICTURE, SMALL, class_images=classes),
    ):
        pytest.fail("training began")


def test_maps_are_pictures_before_and_after(model: StableDiffusion) -> None:
    with multi_concept_run(model, PICTURE, SMALL) as run:
        maps = concept_maps(model, to_pixels(PICTURE.image.resize((64, 64))), run.caption, run.subjects, noises=1)
    assert maps.nouns.shape == maps.modifiers.shape == (2, 16, 16)
    sheet = map_sheet(PICTURE.image, PICTURE.subjects, {"before": maps, "after": maps})
    assert sheet.width > 4 * 192 and sheet.height > 2 * 192


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ConceptPicture(photo(), ()), "at least one concept"),
        (lambda: ConceptPicture(photo(), (CAT, DOG), masks=(Image.new("L", (90, 72)),)), "as many masks"),
        (lambda: ConceptPicture(photo(), (CAT,), masks=(Image.new("L", (9, 72)),)), "masks are 9×72 px"),
        (
            lambda: ConceptPicture(photo(), (CAT,), masks=(Image.new("L", (90, 72)),)),
            "mask of <cat1> cat is black everywhere",
        ),
        (lambda: MultiConceptConfig(rank=0), "rank is 0: give a number from 1"),
        (lambda: MultiConceptConfig(full_kv=True, lora_alpha=8), "full_kv trains no LoRA, so that .* lora_alpha mean"),
        (lambda: MultiConceptConfig(swap_subjects=2), "swap_subjects is 2: give a number from 0 to 1"),
        (lambda: MultiConceptConfig(calibration_weight=-1), "calibration_weight is -1: give a number from 0"),
    ],
)
def test_settings_that_cannot_work_are_errors(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


def test_a_prompt_that_misses_a_concept_is_an_error_before_anything_is_touched(model: StableDiffusion) -> None:
    picture = ConceptPicture(photo(), (CAT, DOG), "photo of a <cat1> cat")
    with pytest.raises(UserError, match="one “<dog1> dog”"), multi_concept_run(model, picture, SMALL):
        pass
    assert PICTURE.class_prompt == "photo of a cat and dog"
    assert replace(PICTURE, prompt="A <CAT1> Cat and <dog1>dog").class_prompt == "A Cat and dog"


def other_adapter(model: StableDiffusion) -> Adapter:
    """An adapter that learned a third word elsewhere."""
    with multi_concept_run(
        model, ConceptPicture(photo(), (Subject("<fox1>", "fox"),)), replace(SMALL, max_train_steps=1)
    ) as run:
        list(run.steps())
        return run.adapter()


def test_prompts_name_concepts_alone_or_together_also_of_two_adapters(
    model: StableDiffusion, unbroken: Adapter, tmp_path: Path
) -> None:
    pets, fox = unbroken.save(tmp_path / "pets"), other_adapter(model).save(tmp_path / "fox")
    base, short = tiny_folder("sd1", tmp_path), Sampling(steps=2)
    editor = Editor.load(pets, base)
    alone, together, plain = (
        np.asarray(editor.edit(text, sampling=short)[0], np.int16)
        for text in ("a <cat1> cat in the snow", "a <cat1> cat and <dog1> dog in the snow", "a cat in the snow")
    )
    assert np.abs(alone - together).max() > 1 and np.abs(alone - plain).max() > 1
    both = Editor.load([pets, fox], base)
    assert set(both.adapter.concepts) == {"<cat1>", "<dog1>", "<fox1>"} and both.adapter.rank == 4  # type: ignore[union-attr]
    assert both.edit("a <fox1> fox and <cat1> cat", sampling=short)[0].size == (64, 64)
    assert "<cat1>" not in editor.model.tokenizers[0].get_vocab()
    with pytest.raises(UserError, match="<cat1>"):
        Editor.load([pets, pets], base)


def test_attach_teaches_a_stock_pipeline_the_words_for_a_while(unbroken: Adapter, tmp_path: Path) -> None:
    pipe = tiny("sd1").pipeline()
    pipe.set_progress_bar_config(disable=True)
    before = pipe.tokenizer
    call = {"num_inference_steps": 2, "output_type": "np", "height": 64, "width": 64}

    def drawn(prompt: str) -> np.ndarray:
        return pipe(prompt, **call, generator=torch.Generator().manual_seed(0)).images

    plain = drawn("a <cat1> cat")
    with attach(pipe, unbroken.save(tmp_path / "pets")) as mine:
        assert np.abs(drawn("a <cat1> cat") - plain).max() > 1e-3
        by_hand = pipe(**mine.inputs("a <cat1> cat"), **call, generator=torch.Generator().manual_seed(0)).images
        assert np.abs(drawn("a <cat1> cat") - by_hand).max() < 1e-5
    assert pipe.tokenizer is before and np.array_equal(drawn("a <cat1> cat"), plain)
