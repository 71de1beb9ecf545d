"""Attention maps of pictures that are not square: their shape is kept, and losses do not depend on its orientation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from personalize.errors import UserError
from personalize.io.figures import overlay
from personalize.models.attention import AttentionSite
from personalize.models.attention_maps import CalibrationMaps, calibration_layers
from personalize.training import checkpoints
from personalize.training.concept_maps import MapSnapshots
from personalize.training.data.concepts import ClassImage
from personalize.training.losses import anchoring, calibration, masked_mse, separation
from personalize.training.multi_concept import multi_concept_run
from tests.support.tiny import tiny
from tests.training.test_multi_concept_run import PICTURE, SMALL

CLOSE = 1e-6  # sums in another order


@pytest.mark.parametrize("turn", [lambda x: x.mT, lambda x: x.flip(-1), lambda x: x.flip(-2)], ids=["T", "lr", "ud"])
def test_losses_of_a_turned_picture_are_equal(turn) -> None:
    rng = torch.Generator().manual_seed(0)
    nouns, modifiers, masks = (torch.rand(2, 16, 24, generator=rng) for _ in range(3))
    output, target = (torch.randn(2, 4, 64, 96, generator=rng) for _ in range(2))
    canvas = (torch.rand(2, 1, 64, 96, generator=rng) > 0.3).float()
    for loss, parts in (
        (calibration, (nouns, modifiers)), (separation, (nouns,)), (anchoring, (nouns, masks)),
        (masked_mse, (output, target, canvas)),
    ):  # fmt: skip
        torch.testing.assert_close(loss(*map(turn, parts)), loss(*parts), atol=CLOSE, rtol=CLOSE)


def pooled(size: tuple[int, int], maps: Tensor) -> Tensor:
    """What is read of the maps (h, w) of one token, of a layer that has them as rows of positions."""
    store = CalibrationMaps(["one"])
    store.probs(maps.reshape(1, 1, -1, 1), AttentionSite("one", "up", 1, True, 1, *size))
    return store.of_tokens(torch.ones(1, 1, 1))[0, 0]


@pytest.mark.parametrize(
    ("size", "expected"),
    [((16, 24), (16, 24)), ((32, 48), (16, 24)), ((26, 38), (16, 23)), ((24, 24), (16, 16)), ((8, 32), (8, 32))],
)
def test_maps_keep_their_shape_when_pooled(size: tuple[int, int], expected: tuple[int, int]) -> None:
    """All were pooled to squares of 16×16, so that a 3:2 map was squeezed."""
    maps = torch.rand(size, generator=torch.Generator().manual_seed(0))
    assert pooled(size, maps).shape == expected
    torch.testing.assert_close(
        pooled((size[1], size[0]), maps.mT.contiguous()).mT, pooled(size, maps), atol=CLOSE, rtol=0
    )


def test_a_picture_and_the_same_one_turned_read_the_same_layers() -> None:
    unet = tiny("sd1").unet
    for size in ((16, 24), (32, 48), (48, 80)):
        assert calibration_layers(unet, size) == calibration_layers(unet, (size[1], size[0]))
    with pytest.raises(UserError, match="3 cells a side"):
        calibration_layers(unet, (3, 96))


@pytest.mark.parametrize("size", [pytest.param((96, 64), marks=pytest.mark.slow), (64, 96)])
def test_maps_are_drawn_over_the_picture_as_it_is_learned(size: tuple[int, int]) -> None:
    picture = replace(PICTURE, image=PICTURE.image.resize(size))
    with multi_concept_run(tiny("sd1"), picture, replace(SMALL, max_train_steps=1)) as run:
        snapshots = MapSnapshots(run, enabled=True)
        snapshots.record("before")
        pictures = snapshots.pictures()
    assert pictures["source"].size == size
    assert snapshots.maps["before"].nouns.shape == (2, size[1] // 4, size[0] // 4)


def test_an_overlay_glows_where_the_map_is_high() -> None:
    maps = torch.zeros(16, 24)
    maps[:4, 20:] = 1
    drawn = np.asarray(overlay(Image.new("RGB", (96, 64)), maps), np.int16)
    assert drawn[4, 90].tolist() == [255, 140, 0] and not drawn[50:, :60].any()


def test_checkpoints_of_letterboxed_pictures_are_refused(tmp_path: Path) -> None:
    """A class picture that is not square was letterboxed too: the run would have gone on with other data."""
    model, square = tiny("sd1"), replace(PICTURE, image=PICTURE.image.resize((64, 64)))
    classes = (ClassImage("a cat", PICTURE.image.resize((128, 64))),)
    with multi_concept_run(model, square, SMALL, class_images=classes) as run:
        run.data_sha256 = multi_concept_hash_before(run)
        next(run.steps())
        run.save_checkpoint(tmp_path)
    with multi_concept_run(model, square, SMALL, class_images=classes) as run:
        with pytest.raises(UserError, match="other pictures, masks or captions; use the same"):
            run.resume(checkpoints.load(tmp_path / "checkpoint-1"))


def multi_concept_hash_before(run) -> str:
    """The hash of the data as it was when all pictures were letterboxed to squares."""
    from personalize.training.data.concepts import content_hash

    image = run.dataset.picture.image
    classes = (part for one in run.class_images for part in one.content())
    return content_hash(f"{image.size}".encode(), image.tobytes(), *classes)
