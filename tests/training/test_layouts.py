"""Updates and their size do not depend on processes, micro-batch or accumulation, for both trainers."""

from __future__ import annotations

import os
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate

from personalize.adapters.adapter import Adapter
from personalize.adapters.textual_inversion import initial_embeddings, installed_tokens
from personalize.errors import UserError
from personalize.io.tensor_files import read_tensors, tensor_bytes
from personalize.models.stable_diffusion import StableDiffusion
from personalize.training import checkpoints
from personalize.training import single_image as single_image_module
from personalize.training.config import MultiConceptConfig, SingleImageConfig
from personalize.training.data.buckets import FittedImage
from personalize.training.data.concepts import ClassImage, ConceptDataset
from personalize.training.data.samples import SampleShard
from personalize.training.multi_concept import multi_concept_run
from personalize.training.single_image import single_image_run
from tests.support.children import run_processes
from tests.support.runs import CAPTION, pixels
from tests.support.tiny import tiny
from tests.training.test_multi_concept_run import CAT, DOG, EXAMPLES, PICTURE

SINGLE = SingleImageConfig(rank=2, samples_per_update=4, max_train_samples=8, targets="attention")
MULTI = MultiConceptConfig(rank=2, samples_per_update=4, max_train_steps=2, learning_rate=1e-3)
CLOSE = 1e-5  # sums in another order differ by 1e-7; Adam divides by √v, so that entries hardly in use show 1e-5 of it


@pytest.fixture(autouse=True)
def few_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """One in sixteen: adding them takes longest of all here."""
    everywhere = single_image_module.module_names
    monkeypatch.setattr(single_image_module, "module_names", lambda *wanted: everywhere(*wanted)[::16])


@pytest.mark.parametrize("kinds", [None, [0, 1, 0, 2, 0, 0, 1, 0, 0, 0]], ids=["alike", "three kinds"])
def test_every_sample_counts_once_whatever_the_layout(kinds: list[int] | None) -> None:
    for batch, processes in product((1, 2, 3, 4, 10), (1, 2, 3, 4, 8, 16)):
        shards = [SampleShard(10, batch, process, processes) for process in range(processes)]
        dealt = [shard.chunks(kinds) for shard in shards]
        assert len({len(chunks) for chunks in dealt}) == 1  # otherwise processes would wait for one another for ever
        chunks = [chunk for chunks in dealt for chunk in chunks]
        assert sorted(i for c in chunks if c.share for i in c.indices) == list(range(10))
        assert all(len(c.indices) <= batch for c in chunks)
        assert all(len({kinds[i] for i in c.indices}) == 1 for c in chunks if kinds)
        weight = {i: c.share / len(c.indices) / len(chunks) for c in chunks if c.share for i in c.indices}
        assert all(value == pytest.approx(0.1) for value in weight.values())


def test_counts_do_not_depend_on_the_layout() -> None:
    """It was 40, 20, 10 and 5 updates on 1, 2, 4 and 8 processes."""
    config = SingleImageConfig()
    for processes, batch in product((1, 2, 4, 8), (1, 4, 10)):
        shard = SampleShard.of(replace(config, train_batch_size=batch), 0, processes)
        assert (shard.samples, shard.updates(config.train_samples())) == (10, 40)


def test_the_largest_batch_is_that_of_any_process() -> None:
    """Of 10 samples on 4 processes it was said that each takes 2, and memory was estimated for as many."""
    shards = [SampleShard(10, 10, process, 4) for process in range(4)]
    assert [len(shard.chunks()[0].indices) for shard in shards] == [2, 3, 2, 3]
    assert {shard.largest for shard in shards} == {3}
    assert str(shards[0]) == "An update: 10 samples, at most 3 at a time on each of 4 processes"
    assert str(SampleShard(8, 2, 0, 2)).endswith(": 8 samples, at most 2 at a time in 2 batches on each of 2 processes")
    assert str(SampleShard(8, 8, 0, 2)) == "An update: 8 samples, 4 at a time on each of 2 processes"
    assert str(SampleShard(1, 8)) == "An update: 1 sample, 1 at a time"


def test_samples_grow_with_the_pictures_above_a_floor() -> None:
    """Ten pictures got forty views each of the default 400 samples."""
    config = SingleImageConfig()
    assert [config.train_samples(pictures) for pictures in (1, 2, 3, 5, 10)] == [400, 400, 600, 1000, 2000]
    floor = replace(config, min_train_samples=340, samples_per_picture=100)
    assert [floor.train_samples(pictures) for pictures in (1, 3, 4)] == [340, 340, 400]
    assert replace(config, max_train_samples=340).train_samples(10) == 340, "a number that is given is the number"


def test_a_run_makes_the_updates_of_its_pictures(model: StableDiffusion) -> None:
    """Mirrored pictures are not counted again."""
    config = replace(SINGLE, max_train_samples=None, min_train_samples=4, samples_per_picture=8, random_flip=True)
    for count, updates in ((1, 2), (3, 6)):
        with single_image_run(model, three_shapes()[:count], CAPTIONS[:count], config) as run:
            assert run.updates == updates


def test_a_layout_that_cannot_keep_the_size_is_refused_with_those_that_can() -> None:
    config = SingleImageConfig(train_batch_size=2, gradient_accumulation_steps=2, samples_per_update=10)
    with pytest.raises(UserError) as caught:
        SampleShard.of(config, 0, 2)
    said = str(caught.value)
    assert "2 × gradient_accumulation_steps 2 × 2 processes is 8 samples, but samples_per_update is 10" in said
    assert "5 × 1, 1 × 5," in said and "--samples_per_update 8" in said
    with pytest.raises(UserError, match="use 10 × 1, 5 × 2|= 10 × 1, 5 × 2, 2 × 5, 1 × 10"):
        SampleShard.of(config)
    whole = replace(config, gradient_accumulation_steps=5)
    assert SampleShard.of(whole).accumulation == 5
    # a run of less than one update was refused, as if samples_per_update, which is 10 as it must be, were 4
    assert SampleShard.of(replace(whole, max_train_samples=4)) == SampleShard(4, 2)


def test_a_sample_is_instance_or_class_by_its_number_in_the_run(model: StableDiffusion) -> None:
    """With batches of one there was no class picture at all, with batches of three the shares were 2 : 1."""
    with installed_tokens(model, {s.token: initial_embeddings(model, s) for s in (CAT, DOG)}):
        data = ConceptDataset(model, PICTURE, 64, 0, EXAMPLES)
        for samples, batch in ((8, 1), (8, 3), (8, 8), (3, 3), (1, 1)):
            shown = [row for b in data.batches(SampleShard(samples, batch), 0, 2) for row in b["instance"].tolist()]
            assert shown == [number % 2 == 0 for number in range(2 * samples)]


CAPTIONS = [CAPTION, "a dog", CAPTION]
WITH_TOKEN = ["a photo of a <rex> dog", "a <rex> dog", "a photo of a <rex> dog"]


def three_shapes() -> list[FittedImage]:
    """Pictures in three aspect ratios, the last padded: in an update of four one of the sizes has a single sample."""
    shapes = ((64, 64), (32, 96), (96, 32))
    images = [FittedImage(interpolate(pixels(), size)) for size in shapes]
    return [*images[:2], replace(images[2], unpadded=(80, 32))]


def single(model: StableDiffusion, config: SingleImageConfig, **more: Any) -> tuple[Adapter, list[float]]:
    captions = WITH_TOKEN if config.instance_token else CAPTIONS
    with single_image_run(model, three_shapes(), captions, config, **more) as run:
        losses = [float(report.losses["loss"]) for report in run.steps()]
        return run.adapter(), losses


def multi(model: StableDiffusion, config: MultiConceptConfig) -> tuple[Adapter, list[float]]:
    masks = tuple(Image.new("L", PICTURE.image.size, 255 - 100 * index) for index in range(2))
    picture = replace(PICTURE, masks=masks)
    with multi_concept_run(model, picture, config, class_images=EXAMPLES) as run:
        losses = [float(report.losses["loss"]) for report in run.steps()]
        return run.adapter(), losses


def multi_shapes(model: StableDiffusion, config: MultiConceptConfig, **more: Any) -> tuple[Adapter, list[float]]:
    """Two concepts of a 3:2 picture, with class pictures of three other shapes."""
    shapes = ((64, 64), (128, 40), (40, 70))
    classes = [ClassImage("photo of a cat", PICTURE.image.rotate(90).resize(size)) for size in shapes]
    picture = replace(PICTURE, image=PICTURE.image.resize((96, 64)))
    with multi_concept_run(model, picture, config, class_images=classes, **more) as run:
        losses = [float(report.losses["loss"]) for report in run.steps()]
        return run.adapter(), losses


TEXT = replace(SINGLE, train_text_encoder=True, proportion_empty_prompts=0.5)
TRAINERS: dict[str, tuple[Any, Any]] = {
    "single_image": (single, SINGLE), "multi_concept": (multi, MULTI),
    "multi_concept, shapes": (multi_shapes, MULTI),
    "text encoders, dropout": (single, TEXT), "token": (single, replace(SINGLE, instance_token="<rex>")),
}  # fmt: skip
KINDS = [
    pytest.param(name, marks=pytest.mark.slow if name not in ("single_image", "multi_concept") else ())
    for name in TRAINERS
]


def tensors(adapter: Adapter) -> dict[str, torch.Tensor]:
    words = {f"{token} {name}": rows for token, parts in adapter.concepts.items() for name, rows in parts.items()}
    return {**adapter.lora, **(adapter.source or {}), **words}


def furthest(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
    assert one.keys() == two.keys()
    return max(float((one[key] - two[key]).abs().max()) for key in one)


@pytest.mark.slow
@pytest.mark.parametrize("trainer", KINDS)
def test_four_micro_batches_learn_the_same(trainer: str, model: StableDiffusion) -> None:
    learn, config = TRAINERS[trainer]
    start, _ = learn(
        model,
        replace(
            config, **({"max_train_steps": 1} if isinstance(config, MultiConceptConfig) else {"max_train_samples": 4})
        ),
    )
    whole, losses = learn(model, replace(config, train_batch_size=4))
    assert furthest(tensors(whole), tensors(start)) > 20 * CLOSE  # something was learned
    for batch in (1, 2, 3):
        other, others = learn(model, replace(config, train_batch_size=batch))
        assert others == pytest.approx(losses, rel=1e-5)
        assert furthest(tensors(whole), tensors(other)) <= CLOSE


def test_a_run_may_be_resumed_in_another_layout(model: StableDiffusion, tmp_path: Path) -> None:
    whole, _ = single(model, SINGLE)
    with single_image_run(model, three_shapes(), CAPTIONS, SINGLE) as run:
        next(run.steps())
        run.save_checkpoint(tmp_path)
    with single_image_run(model, three_shapes(), CAPTIONS, replace(SINGLE, train_batch_size=1)) as run:
        run.resume(checkpoints.load(tmp_path / "checkpoint-1"))
        assert [report.update for report in run.steps()] == [2]
        assert furthest(tensors(whole), tensors(run.adapter())) <= CLOSE


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("trainer", KINDS)
@pytest.mark.parametrize("batch", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_two_processes_learn_what_one_does(trainer: str, batch: int, model: StableDiffusion, tmp_path: Path) -> None:
    learn, config = TRAINERS[trainer]

    def learned(rank: int) -> list[float]:
        adapter, losses = learn(model, replace(config, train_batch_size=batch))
        (tmp_path / f"{rank}").write_bytes(tensor_bytes(tensors(adapter)))
        return losses

    ranks = run_processes(learned, 2)
    (alone,) = run_processes(lambda _: learned(9), 1)
    one, two, other = (read_tensors(tmp_path / name).tensors for name in ("9", "0", "1"))
    assert ranks[0] == ranks[1] == pytest.approx(alone, rel=1e-5)
    assert all(torch.equal(two[key], other[key]) for key in two)
    assert furthest(one, two) <= CLOSE


def test_sdxl_is_told_the_size_of_each_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    base, sizes_read = tiny("sdxl"), []
    predict = StableDiffusion.predict

    def recorded(self: StableDiffusion, latents: torch.Tensor, t: torch.Tensor, conditioning: Any) -> torch.Tensor:
        assert conditioning.time_ids is not None
        sizes_read.append((tuple(latents.shape[-2:]), conditioning.time_ids[0].tolist()))
        return predict(self, latents, t, conditioning)

    monkeypatch.setattr(StableDiffusion, "predict", recorded)
    images = [replace(three_shapes()[1], original=(300, 900), corner=(0, 8)), three_shapes()[0]]
    with single_image_run(base, images, CAPTION, replace(SINGLE, samples_per_update=2, max_train_samples=2)) as run:
        list(run.steps())
    assert sorted(sizes_read) == [((8, 24), [300, 900, 0, 8, 32, 96]), ((16, 16), [64, 64, 0, 0, 64, 64])]


def test_a_graph_of_pictures_of_several_sizes_is_refused(model: StableDiffusion) -> None:
    with pytest.raises(UserError, match="cuda_graph needs pictures of one shape, got 3 sizes"):
        with single_image_run(model, three_shapes(), CAPTIONS, replace(SINGLE, cuda_graph=True)):
            pass


def test_every_second_view_is_mirrored_only_if_asked(model: StableDiffusion) -> None:
    for flip, count in ((False, 3), (True, 6)):
        with single_image_run(model, three_shapes(), CAPTIONS, replace(SINGLE, random_flip=flip)) as run:
            assert len(run.dataset) == count  # type: ignore[arg-type]
