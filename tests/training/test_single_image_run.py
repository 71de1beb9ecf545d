"""A whole run on tiny models: reproducible, resumable to the bit, without a trace, and actually learning."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from personalize.adapters.adapter import Adapter
from personalize.adapters.lora import load_lora, remove_lora
from personalize.errors import UserError
from personalize.models.stable_diffusion import Conditioning, StableDiffusion
from personalize.training import checkpoints
from personalize.training.config import SingleImageConfig
from personalize.training.data.concepts import ClassImage
from personalize.training.single_image import learn, single_image_run
from tests.support.runs import CAPTION, SMALL, pixels, probe_loss, same
from tests.support.tiny import tiny, tiny_sd1


@pytest.fixture(scope="module")
def unbroken(model: StableDiffusion) -> Adapter:
    return learn(model, pixels(), CAPTION, SMALL)


def test_forgedit_c23_same_seed_same_adapter_other_seed_another(model: StableDiffusion, unbroken: Adapter) -> None:
    torch.manual_seed(123)  # global state plays no part
    assert same(learn(model, pixels(), CAPTION, SMALL), unbroken)
    assert not same(learn(model, pixels(), CAPTION, replace(SMALL, seed=1)), unbroken)


def test_the_model_is_as_it_was_also_after_an_error(model: StableDiffusion) -> None:
    before = {name: (id(module), module.training) for name, module in model.unet.named_modules()}
    weights = {name: (tensor.clone(), tensor.requires_grad) for name, tensor in model.unet.named_parameters()}
    with pytest.raises(RuntimeError), single_image_run(model, pixels(), CAPTION, SMALL) as run:
        next(run.steps())
        raise RuntimeError
    assert {name: (id(module), module.training) for name, module in model.unet.named_modules()} == before
    for name, tensor in model.unet.named_parameters():
        assert torch.equal(tensor, weights[name][0]) and tensor.requires_grad == weights[name][1]
        assert tensor.grad is None


def test_the_adapter_says_how_it_was_made(model: StableDiffusion, unbroken: Adapter) -> None:
    assert unbroken.rank == 2 and unbroken.alpha == 2.0 and len(unbroken.lora) == 2 * 104
    assert unbroken.source is not None and unbroken.source["embeds"].shape == (1, 77, 32)
    assert unbroken.info["caption"] == CAPTION and unbroken.info["updates"] == 4
    assert unbroken.info["base"] == {**model.identity, "prediction_type": "epsilon"}
    assert unbroken.info["config"]["learning_rate"] == 5e-3 and unbroken.info["size"] == [64, 64]


def test_forgedit_c23_resumed_run_is_bit_identical(model: StableDiffusion, unbroken: Adapter, tmp_path: Path) -> None:
    with single_image_run(model, pixels(), CAPTION, SMALL) as run:
        steps: Iterator = run.steps()
        for _ in range(2):
            next(steps)
        folder = run.save_checkpoint(tmp_path)
    assert folder == tmp_path / "checkpoint-2"
    assert (folder / "pytorch_lora_weights.safetensors").is_file()
    with single_image_run(model, pixels(), CAPTION, SMALL) as run:
        found = checkpoints.find(tmp_path, "latest")
        assert found is not None
        run.resume(found)
        assert [report.update for report in run.steps()] == [3, 4]
        assert same(run.adapter(), unbroken)
    with single_image_run(model, pixels(), CAPTION, SMALL) as run:  # without the optimizer's state it is not
        forgetful = replace(found, optimizer=run.optimizer.state_dict())
        checkpoints.restore(forgetful, run.objective.trainable(), run.optimizer)
        run.update = 2
        list(run.steps())
        assert not same(run.adapter(), unbroken)


def test_resuming_another_run_is_refused(model: StableDiffusion, tmp_path: Path) -> None:
    with single_image_run(model, pixels(), CAPTION, SMALL) as run:
        next(run.steps())
        run.save_checkpoint(tmp_path)
    for settings, image, message in (
        (replace(SMALL, rank=3), -pixels(), "other pictures, masks or captions"),
        (replace(SMALL, rank=3), pixels(), "rank = 2, this run has 3"),
        (replace(SMALL, max_train_samples=5), pixels(), None),
    ):
        with single_image_run(model, image, CAPTION, settings) as run:
            found = checkpoints.find(tmp_path, "checkpoint-1")
            assert found is not None
            if message is None:
                run.resume(found)
                continue
            with pytest.raises(UserError, match=message):
                run.resume(found)


def test_standalone_has_no_source_embedding(model: StableDiffusion) -> None:
    adapter = learn(model, pixels(), CAPTION, replace(SMALL, standalone=True, max_train_samples=1))
    assert adapter.source is None and adapter.info["standalone"] is True


def test_no_weight_moved_is_said(model: StableDiffusion) -> None:
    with pytest.warns(UserWarning, match="no adapter weight changed"):
        adapter = learn(model, pixels(), CAPTION, replace(SMALL, learning_rate=1e-45, max_train_samples=1))
    assert not any(tensor.any() for name, tensor in adapter.lora.items() if "lora_B" in name)


def test_forgedit_c20_both_parts_learn_and_both_are_needed() -> None:
    """Measured: 2.54 at the start; after 16 updates 1.93 with e alone, 1.18 with the adapter alone, 1.16 with both."""
    model = tiny_sd1()
    with torch.no_grad():
        start = model.prompts([CAPTION])
    first = probe_loss(model, start)
    quick = SingleImageConfig(
        rank=8, learning_rate=3e-3, text_embedding_lr=3e-2, max_train_samples=32, samples_per_update=2
    )
    adapter = learn(model, pixels(), CAPTION, quick)
    assert adapter.source is not None
    learned = Conditioning(adapter.source["embeds"])
    text_alone = probe_loss(model, learned)
    load_lora(model.unet, adapter.lora, adapter.rank, adapter.alpha)
    both, adapter_alone = probe_loss(model, learned), probe_loss(model, start)
    remove_lora(model.unet)
    assert both < 0.5 * first
    assert both < text_alone and both < adapter_alone


def test_sdxl_learns_tokens_and_pooled_vector() -> None:
    model = tiny("sdxl")
    with torch.no_grad():
        start = model.prompts([CAPTION], (64, 64))
    adapter = learn(model, pixels(), CAPTION, replace(SMALL, max_train_samples=1))
    assert adapter.source is not None and start.pooled is not None and len(adapter.lora) == 2 * 200
    assert not torch.equal(adapter.source["embeds"], start.embeds)
    assert not torch.equal(adapter.source["pooled"], start.pooled)


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(UserError, match="rank is 0: give a number from 1"):
        SingleImageConfig(rank=0)


def test_fewer_samples_than_an_update_has_are_one_update_of_them_all(model: StableDiffusion) -> None:
    few = replace(SMALL, max_train_samples=3, samples_per_update=10, train_batch_size=1)
    with single_image_run(model, pixels(), CAPTION, few) as run:
        assert run.updates == 1 and run.shard.samples == 3 and len(list(run.steps())) == 1
        learned = run.adapter()
    assert same(learned, learn(model, pixels(), CAPTION, replace(few, samples_per_update=3)))


def several() -> Tensor:
    return torch.cat([pixels(), -pixels(), pixels().flip(-1)])


def test_several_pictures_have_a_row_of_the_source_for_each_caption(model: StableDiffusion) -> None:
    captions = ["a photo of a cat", "a photo of a dog", "a photo of a cat"]
    with single_image_run(model, several(), captions, replace(SMALL, max_train_samples=3)) as run:
        start = run.objective.embeds.detach().clone()
        list(run.steps())
        moved = (run.objective.embeds - start).abs().amax((1, 2))
        adapter = run.adapter()
        assert len(moved) == 2 and bool((moved > 0).all())
        assert torch.equal(adapter.source["embeds"], run.objective.embeds)  # type: ignore[index]
    assert adapter.info["caption"] == captions[0] and adapter.info["captions"] == captions[:2]
    assert adapter.info["caption_counts"] == [2, 1]
    assert adapter.info["pictures"] == 3  # which the trainers alone added, so that cards of checkpoints said one
    assert adapter.starting_from(prompt=captions[1]).info.keys().isdisjoint({"captions", "caption_counts"})
    with pytest.raises(ValueError, match="3 pictures need one caption or as many, got 2"):
        learn(model, several(), captions[:2], SMALL)


def test_a_run_goes_on_with_the_caption_that_each_picture_had(model: StableDiffusion, tmp_path: Path) -> None:
    """Captions that had changed places among the pictures made the same run."""
    few, cat, dog = replace(SMALL, max_train_samples=6), "a photo of a cat", "a photo of a dog"
    with single_image_run(model, several(), [cat, dog, cat], few) as run:
        next(run.steps())
        checkpoint = checkpoints.load(run.save_checkpoint(tmp_path))
    with single_image_run(model, several(), [cat, dog, cat], few) as run:
        run.resume(checkpoint)
    with single_image_run(model, several(), [cat, dog, dog], few) as run:
        with pytest.raises(UserError, match="made with other pictures, masks or captions"):
            run.resume(checkpoint)


def test_a_mask_makes_the_outside_count_less(model: StableDiffusion) -> None:
    masks = torch.zeros(1, 1, 64, 64)
    masks[..., :32] = 1
    with single_image_run(model, pixels(), CAPTION, SMALL, masks=masks) as run:
        weights = next(run.dataset.batches(run.shard, 0, 1))["weights"]
        assert torch.allclose(weights[..., :8], torch.ones(1, 1, 16, 8))
        assert torch.allclose(weights[..., 8:], torch.full((1, 1, 16, 8), 0.1))


def test_class_pictures_are_learned_beside_their_own_caption(model: StableDiffusion) -> None:
    examples = [ClassImage("a photo of a dog", Image.new("RGB", (70, 90), colour)) for colour in ("red", "blue")]
    settings = replace(SMALL, samples_per_update=2)
    with single_image_run(model, pixels(), CAPTION, settings, class_images=examples) as run:
        reports = list(run.steps())
        assert all(set(report.losses) == {"loss", "mse", "prior"} for report in reports)
        loss = reports[0].losses
        assert torch.allclose(loss["loss"], loss["mse"] + loss["prior"])
        batch = next(run.dataset.batches(run.shard, 0, 1))
        assert batch["rows"].tolist() == [0, 0, 1, 1] and len(batch["latents"]) == 4
        assert not torch.equal(batch["latents"][2], batch["latents"][3])  # red and blue
        assert len(run.objective.embeds) == 1  # the class caption's embedding does not learn
    other = [replace(example, caption="a photo of a fox") for example in examples]
    with single_image_run(model, pixels(), CAPTION, settings, class_images=other) as again:
        assert again.data_sha256 != run.data_sha256


@pytest.mark.parametrize("name", ["sd1", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_text_encoders_learn_in_the_place_of_the_source(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    weights = [{key: value.clone() for key, value in part.state_dict().items()} for part in model.text_encoders]
    settings = replace(SMALL, train_text_encoder=True, text_encoder_lr=5e-3, max_train_samples=3)
    with single_image_run(model, pixels(), CAPTION, settings) as run:
        assert "embeds" not in run.objective.trainable()
        list(run.steps())
        learned = run.objective.text_parameters()
        assert all(bool(b.any()) for b in learned[1::2])  # every B has moved: none is out of reach of the loss
        adapter = run.adapter()
    assert adapter.source is not None and adapter.info["standalone"] is False
    layers = {"text_encoder": 2 if name == "sd1" else 1, "text_encoder_2": 2 if name == "sdxl" else 0}
    for part, count in {part: 4 * count for part, count in layers.items()}.items():  # SDXL: not the first's last layer
        assert sum(key.startswith(f"{part}.") and ".lora_A." in key for key in adapter.lora) == count
    for part, before in zip(model.text_encoders, weights, strict=True):
        assert set(part.state_dict()) == set(before)
        assert all(torch.equal(value, before[key]) for key, value in part.state_dict().items())
    loaded = Adapter.load(adapter.save(tmp_path / "mine"))
    with loaded.apply_text(model), torch.no_grad():  # what the encoders with the adapter say is what was saved
        conditioning = model.prompts([CAPTION], (64, 64))
    assert (conditioning.embeds - loaded.source["embeds"]).abs().max() < 1e-5  # type: ignore[index]


def test_moments_of_8_bits_survive_a_checkpoint_bit_for_bit(model: StableDiffusion, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    settings = replace(SMALL, use_8bit_adam=True, rank=64, max_train_samples=3)  # 64 × 64 is large enough
    whole = learn(model, pixels(), CAPTION, settings)
    with single_image_run(model, pixels(), CAPTION, settings) as run:
        steps = run.steps()
        next(steps), next(steps)
        run.save_checkpoint(tmp_path)
        kinds = {value.dtype for state in run.optimizer.state.values() for value in state.values() if
                 isinstance(value, Tensor)}  # fmt: skip
        assert {torch.uint8, torch.float32} <= kinds
    with single_image_run(model, pixels(), CAPTION, settings) as run:
        found = checkpoints.find(tmp_path, "latest")
        assert found is not None
        run.resume(found)
        list(run.steps())
        assert same(run.adapter(), whole)


def test_checkpointing_learns_the_same_and_may_change_on_resuming(
    model: StableDiffusion, unbroken: Adapter, tmp_path: Path
) -> None:
    with single_image_run(model, pixels(), CAPTION, SMALL) as run:
        next(run.steps())
        run.save_checkpoint(tmp_path)
    with single_image_run(model, pixels(), CAPTION, replace(SMALL, gradient_checkpointing=True)) as run:
        found = checkpoints.find(tmp_path, "latest")
        assert found is not None
        run.resume(found)
        list(run.steps())
        assert same(run.adapter(), unbroken)


def test_a_base_of_4_bits_learns_and_says_so() -> None:
    pytest.importorskip("bitsandbytes")
    model = tiny_sd1()
    identity = model.identity
    model.unet.to(torch.bfloat16)
    model.quantize()
    adapter = learn(model, pixels(), CAPTION, replace(SMALL, max_train_samples=1))
    assert adapter.info["base"]["quantisation"] == "nf4" and adapter.info["base"]["sha256"] == identity["sha256"]
    assert all(bool(value.any()) for key, value in adapter.lora.items() if ".lora_B." in key)
    adapter.check_base(tiny_sd1())  # made on 4 bits, used on the whole base
