"""Class pictures of any shape are learned whole, in the sizes of the subject's; their padding does not count."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from personalize.models import parameterization
from personalize.training.data import class_images
from personalize.training.data.buckets import FittedImage, fit
from personalize.training.data.class_images import BATCH, METADATA, from_base, from_folder
from personalize.training.data.concepts import ClassImage
from personalize.training.data.samples import LatentDataset
from personalize.training.single_image import single_image_run
from tests.support.runs import CAPTION, SMALL, pixels
from tests.support.tiny import tiny

SHAPES = {"wide": (600, 200), "tall": (200, 600), "square": (300, 300), "small": (40, 30)}
SETTINGS = replace(SMALL, max_train_samples=8, samples_per_update=4)


def folder_of(path: Path) -> list[ClassImage]:
    """A teal picture of each of `SHAPES`, with red in its four corners, as `--class_data_dir` reads them."""
    for name, (width, height) in SHAPES.items():
        image = Image.new("RGB", (width, height), "teal")
        w, h = width // 8, height // 8
        for left, top in ((0, 0), (width - w, 0), (0, height - h), (width - w, height - h)):
            ImageDraw.Draw(image).rectangle((left, top, left + w - 1, top + h - 1), "red")
        image.save(path / f"{name}.png")
    return from_folder(path, "a photo of a cat")


def instance() -> list[FittedImage]:
    """A square picture and one of 2:1, both of which fill their buckets."""
    wide = torch.nn.functional.interpolate(pixels(), size=(64, 128))
    return [FittedImage(pixels()), FittedImage(wide)]


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_they_are_whole_in_each_size_of_the_subjects_pictures(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They were cut to the sizes' middle, where no corner is."""
    model, classes, seen = tiny(family), folder_of(tmp_path), list[Tensor]()
    posterior = model.posterior
    monkeypatch.setattr(model, "posterior", lambda one: (seen.append(one.cpu()), posterior(one))[1])
    with single_image_run(model, instance(), CAPTION, SETTINGS, class_images=classes) as run:
        assert isinstance(run.dataset, LatentDataset)
        priors = run.dataset.prior
        assert [prior.mean[0].shape[-2:] for prior in priors] == [(16, 16), (16, 32)]
        shown = seen[2:]
        assert [one.shape[-2:] for one in shown] == [(64, 64)] * 4 + [(64, 128)] * 4
        for number, (one, image) in enumerate(zip(shown, [*classes, *classes], strict=True)):
            prior, place = priors[number // 4], number % 4
            assert prior.weights is not None
            weights, (width, height) = prior.weights[place], image.open().size
            scale = min(one.shape[-2] / height, one.shape[-1] / width)
            h, w = round(height * scale), round(width * scale)
            red = (one[0, 0] > 0.3) & (one[0, 1] < -0.2)
            whole = float(red[:h, :w].float().mean())
            assert whole == pytest.approx(4 / 64, abs=0.03), image  # a pixel along each edge of a small corner is mixed
            assert float(weights.mean()) == pytest.approx(h * w / (one.shape[-2] * one.shape[-1]), abs=1e-6)
            if prior.time_ids is not None:
                assert prior.time_ids[place].tolist() == [height, width, 0, 0, one.shape[-2], one.shape[-1]]
        losses = [report.losses for report in run.steps()]
    assert all((prior.time_ids is not None) == (family == "sdxl") for prior in priors)
    assert len(losses) == 2 and all(torch.isfinite(row["prior"]) for row in losses)


def test_their_padding_has_no_weight_beside_pictures_that_have_none(tmp_path: Path) -> None:
    """Of a batch only the class pictures may be weighted, or only the subject's: every sample has its own weights."""
    classes = folder_of(tmp_path)
    for images in (instance()[:1], [fit(Image.new("RGB", (64, 40)), None, 64, 32)]):
        with single_image_run(tiny("sd1"), images, CAPTION, SETTINGS, class_images=classes[-2:]) as run:
            (batch,) = next(run.dataset.updates(run.shard, 0, 1))
            whole = [bool(row.min() == 1) for row in batch["weights"]]
            assert len(whole) == 8 and whole[:4] == [images[0].weights(1.0) is None] * 4 and not all(whole[4:])


def test_the_loss_does_not_see_their_padding(tmp_path: Path) -> None:
    """The model's error in the padding is made huge by the noise there: the loss of the class pictures stays equal."""
    classes, losses = folder_of(tmp_path)[:1], []
    with single_image_run(tiny("sd1"), instance()[:1], CAPTION, SETTINGS, class_images=classes) as run:
        (batch,) = next(run.dataset.updates(run.shard, 0, 1))
        output = torch.zeros_like(batch["noise"])
        run.model.predict = lambda *_: output  # type: ignore[method-assign]
        for size in (1.0, 100.0):
            noise = torch.where(batch["weights"] > 0, batch["noise"], size * batch["noise"])
            losses.append(float(run.objective(batch | {"noise": noise}).parts["prior"]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


LONG = "a photo of a dog in the park on the beach " * 12


@pytest.mark.parametrize(
    "change",
    [{}, {"train_text_encoder": True}, {"proportion_empty_prompts": 0.5},
     {"train_text_encoder": True, "proportion_empty_prompts": 0.5}],
    ids=["source", "text encoders", "dropout", "both"],
)  # fmt: skip
def test_their_long_captions_change_nothing_of_the_subjects(change: dict[str, Any], tmp_path: Path) -> None:
    """The subject's caption got as many chunks of 75 tokens, of nothing, and was learned so; alone it has one."""
    image, seen = folder_of(tmp_path)[0], []
    for caption in ("a photo of a dog", LONG):
        with single_image_run(
            tiny("sd1"), instance()[:1], CAPTION, replace(SETTINGS, **change),
            class_images=[replace(image, caption=caption)],
        ) as run:  # fmt: skip
            assert run.objective.source().embeds.shape[:2] == (1, 77)
            (batch,) = next(run.dataset.updates(run.shard, 0, 1))
            assert "dropped" not in batch or 0 < int(batch["dropped"].sum()) < 4
            with torch.no_grad():
                seen.append((run.objective.conditioning(batch["rows"]).embeds.shape[1], run.objective(batch).parts))
    (short, plain), (long, beside) = seen
    assert (short, long) == (77, 154)
    assert float(beside["mse"]) == pytest.approx(float(plain["mse"]), rel=1e-5)
    assert float(beside["prior"]) != pytest.approx(float(plain["prior"]), rel=1e-5)


def test_a_long_caption_that_is_dropped_is_the_null_of_sampling() -> None:
    """Of SDXL that is zeros; behind its first 77 positions was the empty prompt."""
    model = tiny("sdxl")
    model.zero_null = True
    with single_image_run(model, pixels(), LONG, replace(SETTINGS, proportion_empty_prompts=0.5)) as run:
        both = run.objective.conditioning(torch.tensor([0, 0]))
        mixed = run.objective._without_captions(both, torch.tensor([True, False]))
        assert mixed.embeds.shape[1] == 154 and torch.equal(mixed.embeds[1], both.embeds[1])
        assert not bool(mixed.embeds[0].any())


def pictures(images: list[ClassImage]) -> list[bytes]:
    return [Path(str(image.picture)).read_bytes() for image in images]


def test_drawn_ones_are_of_the_base_as_it_is_loaded(tmp_path: Path) -> None:
    """Those of an ε base were taken for those of the same weights as a v base."""
    wishes, drawn = {"size": (64, 64), "steps": 2, "cache": tmp_path}, []
    for kind in ("v_prediction", "epsilon"):
        model = tiny("sd2v")
        model.prediction_type, model.parameterization = kind, parameterization.of(kind)
        drawn.append(pictures(from_base(model, "a cat", 1, **wishes)))
    assert drawn[0] != drawn[1]
    model = tiny("sd2v")
    model._identity = model.identity  # as after `quantize`
    from_base(model, "a cat", 1, **wishes)
    assert len(list(tmp_path.iterdir())) == 3
    model.name = "elsewhere"  # the same base in another folder
    from_base(model, "a cat", 1, **wishes)
    assert len(list(tmp_path.iterdir())) == 3


def test_drawing_goes_on_behind_the_last_whole_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that was drawn before an interrupt was lost."""
    wishes, asked, real = {"size": (64, 64), "steps": 1}, list[list[int]](), class_images.sample

    def sample(model, edit, seeds, *rest):  # type: ignore[no-untyped-def]
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(seeds)
        return real(model, edit, seeds, *rest)

    monkeypatch.setattr(class_images, "sample", sample)
    with pytest.raises(KeyboardInterrupt, match="the same command draws the others"):
        from_base(tiny("sd1"), "a cat", 3 * BATCH, cache=tmp_path / "a", **wishes)
    (folder,) = (tmp_path / "a").iterdir()
    assert len(list(folder.iterdir())) == 2 * BATCH and not (folder / METADATA).exists()
    (folder / "0001.png").unlink()  # a batch that was not written whole
    asked.clear()
    images = from_base(tiny("sd1"), "a cat", 2 * BATCH + 1, cache=tmp_path / "a", **wishes)
    assert asked == [list(range(BATCH)), list(range(2 * BATCH, 3 * BATCH))] and (folder / METADATA).is_file()
    monkeypatch.setattr(class_images, "sample", real)
    assert pictures(images) == pictures(from_base(tiny("sd1"), "a cat", 3 * BATCH, cache=tmp_path / "b", **wishes))[:9]


def test_fewer_or_more_of_them_are_the_same_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wishes = {"size": (64, 64), "steps": 1, "cache": tmp_path}
    five = pictures(from_base(tiny("sd1"), "a cat", BATCH + 1, **wishes))
    monkeypatch.setattr(class_images, "sample", lambda *_: pytest.fail("drawn again"))
    assert pictures(from_base(tiny("sd1"), "a cat", 2, **wishes)) == five[:2]
    assert pictures(from_base(tiny("sd1"), "a cat", 2 * BATCH, **wishes))[:5] == five
