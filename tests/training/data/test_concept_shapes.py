"""Pictures of two subjects are learned in their own shape: nothing is letterboxed, and masks stay on their subjects."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from personalize.adapters.subjects import Subject
from personalize.adapters.textual_inversion import initial_embeddings, installed_tokens
from personalize.embedded.scenes import random_scene, render
from personalize.io.image_files import image_size, load_image
from personalize.io.images import to_pixels
from personalize.models.stable_diffusion import StableDiffusion
from personalize.training.data.augmentation import FAR, NEAR, canvas_mask, draw_view, render_view
from personalize.training.data.concepts import ClassImage, ConceptDataset, ConceptPicture
from personalize.training.data.samples import SampleShard
from tests.support.tiny import tiny

CAT, DOG = Subject("<cat1>", "cat"), Subject("<dog1>", "dog")
SHAPES = {"3:2": (240, 160), "2:3": (160, 240), "16:9": (320, 180), "9:16": (180, 320), "square": (200, 200)}


def scene_picture(name: str, *, masked: bool = True) -> tuple[ConceptPicture, tuple[Image.Image, ...]]:
    """A scene of two subjects in another shape, and its masks."""
    image, masks = render(random_scene(3, split="test-shapes", objects=2), 192)
    size = SHAPES[name]
    drawn = tuple(Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.NEAREST) for mask in masks)
    return ConceptPicture(Image.fromarray(image).resize(size), (CAT, DOG), "", drawn if masked else ()), drawn


@pytest.fixture(scope="module")
def model() -> Iterator[StableDiffusion]:
    base = tiny("sd1")
    with installed_tokens(base, {s.token: initial_embeddings(base, s) for s in (CAT, DOG)}):
        yield base


def cells(mask: Tensor, size: tuple[int, int]) -> Tensor:
    return adaptive_avg_pool2d(mask[None], size)[0]


@pytest.mark.parametrize(("name", "bucket"), [("3:2", (64, 96)), ("2:3", (96, 64)), ("square", (64, 64))])
def test_a_picture_fills_its_latents_and_its_masks_lie_where_the_scene_has_them(
    name: str, bucket: tuple[int, int], model: StableDiffusion
) -> None:
    """It was put into the middle of a square: a third of all latents was grey."""
    picture, masks = scene_picture(name)
    row = ConceptDataset(model, picture, 64, 0, augment=False).instance(0, 0)
    size = (bucket[0] // 4, bucket[1] // 4)
    assert row["mean"].shape == (4, *size) and bool(row["canvas"].all())
    plain = picture.image.resize((bucket[1], bucket[0]), Image.Resampling.BICUBIC)
    torch.testing.assert_close(row["mean"], model.posterior(to_pixels(plain))[0][0])
    true = torch.cat([(to_pixels(mask)[:, 0] + 1) / 2 for mask in masks])
    assert float((cells(row["masks"], size) - cells(true, size)).abs().max()) < 0.08  # a cell of 4×4 px: their edges


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("name", ["16:9", "9:16"])
def test_a_shape_between_the_buckets_keeps_its_subjects_and_learns_no_padding(
    name: str, masked: bool, model: StableDiffusion
) -> None:
    picture, masks = scene_picture(name, masked=masked)
    data = ConceptDataset(model, picture, 64, 0, augment=False)
    row, fitted = data.instance(0, 0), data.fitted
    assert sorted(fitted.size) == [64, 96] and tuple(row["canvas"].shape[1:]) == tuple(
        side // 4 for side in fitted.size
    )
    view = draw_view(fitted, torch.Generator().manual_seed(0), augment=False, random_flip=False)
    shown = torch.cat([render_view(mask, view, fitted) for mask in masks])
    assert min(view.size) >= 54, "the whole of a canvas, but for the padding of its bucket"
    for own, mask in zip(shown, masks, strict=True):
        box = fitted.box or (0, 0, *mask.size)
        scale = view.size[0] / (box[3] - box[1]) * view.size[1] / (box[2] - box[0])
        whole = float(np.asarray(mask).sum()) / 255 * scale  # in pixels of the bucket
        assert float(own.sum()) == pytest.approx(whole, rel=0.02), "no part of a subject is lost"
    counted = interpolate(row["canvas"][None], scale_factor=4)[0, 0].bool()
    inside = torch.zeros(fitted.size, dtype=torch.bool)
    inside[: view.size[0], : view.size[1]] = True
    assert not bool((counted & ~inside).any()) and int(counted.sum()) > 0.95 * int(inside.sum())


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("name", SHAPES)
def test_masks_move_with_their_subject_in_every_view(name: str, masked: bool) -> None:
    width, height = SHAPES[name]
    image, mask = Image.new("RGB", (width, height), "black"), Image.new("L", (width, height))
    box = (width // 5, height // 6, width // 2, height * 3 // 4)
    ImageDraw.Draw(image).rectangle(box, "white")
    ImageDraw.Draw(mask).rectangle(box, 255)
    fitted = ConceptPicture(image, (CAT,), "", (mask,) if masked else ()).fitted(64, 32)
    rng, prefixes = torch.Generator().manual_seed(0), set[str]()
    for _ in range(60):
        view = draw_view(fitted, rng)
        prefixes.add(view.prefix)
        seen, moved = render_view(image, view, fitted), render_view(mask, view, fitted)
        counted = interpolate(canvas_mask(view, fitted, 4)[None], scale_factor=4)[0, 0].bool()
        assert seen.shape[1:] == moved.shape[1:] == counted.shape == fitted.size and bool(counted.any())
        agree = (seen[0] > 0.6) == (moved[0] > 0.8)
        assert float(agree[counted].float().mean()) > 0.95  # the two filters blur differently
        if view.prefix in FAR:
            assert bool((seen[0][counted].abs() > 0.05).float().mean() > 0.9), "no grey counts"
    assert prefixes == {"", *FAR, *NEAR}


@pytest.mark.parametrize(("width", "height"), [(2000, 20), (20, 2000)])
def test_a_strip_has_cells_that_count_in_every_view(width: int, height: int) -> None:
    fitted = ConceptPicture(Image.new("RGB", (width, height), "white"), (CAT,)).fitted(64, 32)
    rng = torch.Generator().manual_seed(0)
    assert all(bool(canvas_mask(draw_view(fitted, rng), fitted, 4).any()) for _ in range(200))


def test_a_batch_is_of_one_shape_and_samples_are_what_their_number_says(model: StableDiffusion) -> None:
    classes = [ClassImage("a cat", Image.new("RGB", size, "gray")) for size in ((64, 64), (70, 140), (160, 80))]
    picture, _ = scene_picture("3:2")
    data = ConceptDataset(model, picture, 64, 0, classes)
    alone = [data.batches(SampleShard(8, 1), 0, 2), data.batches(SampleShard(8, 8), 0, 2)]
    dealt = [[(b["latents"].shape[-2:], flag) for b in batches for flag in b["instance"].tolist()] for batches in alone]
    assert sorted(dealt[0]) == sorted(dealt[1]) and len(dealt[0]) == 16
    assert len({size for size, flag in dealt[0] if not flag}) > 1
    assert sum(flag for _, flag in dealt[0]) == 8 and all(size == (16, 24) for size, flag in dealt[0] if flag)
    assert {tuple(size) for size, flag in dealt[0] if not flag} <= {(16, 16), (32, 16), (16, 32)}


def test_sdxl_is_told_the_size_of_each_picture() -> None:
    base = tiny("sdxl")
    with installed_tokens(base, {s.token: initial_embeddings(base, s) for s in (CAT, DOG)}):
        picture, _ = scene_picture("2:3", masked=False)
        data = ConceptDataset(base, picture, 64, 0, [ClassImage("a cat", Image.new("RGB", (70, 140)))])
        read = [b["time_ids"].tolist() for b in data.batches(SampleShard(2), 0, 1)]
    assert read == [[[240, 160, 0, 0, 96, 64]], [[140, 70, 0, 0, 128, 64]]]


def test_sdxl_is_told_the_corner_of_a_mirrored_cut_in_the_mirrored_picture() -> None:
    """96 × 64 px of a picture 16:9, of which 14 of 114 px are cut, all on the side away from the subjects."""
    base, (image, masks) = tiny("sdxl"), (Image.new("RGB", (320, 180), "teal"), [])
    for left in (200, 280):
        masks.append(Image.new("L", image.size))
        masks[-1].paste(255, (left, 20, left + 39, 160))
    with installed_tokens(base, {s.token: initial_embeddings(base, s) for s in (CAT, DOG)}):
        picture = ConceptPicture(image, (CAT, DOG), "", tuple(masks))
        data = ConceptDataset(base, picture, 64, 0, augment=False, random_flip=True)
        corners = {tuple(data.instance(0, index)["time_ids"][2:4].tolist()) for index in range(8)}
    left = data.fitted.corner[1]
    assert data.fitted.size == (64, 96) and left > 0
    assert corners == {(0, left), (0, round(320 * 64 / 180) - 96 - left)}


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_the_size_by_the_header_is_that_of_the_picture_as_it_is_read(
    orientation: int, suffix: str, tmp_path: Path
) -> None:
    """That of a TIFF, which Pillow turns in the header already, was turned twice: its bucket lay across."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = tmp_path / f"a.{suffix}"
    Image.new("RGB", (60, 40)).save(picture, exif=exif)
    assert image_size(picture) == load_image(picture).size == ((40, 60) if orientation > 4 else (60, 40))
