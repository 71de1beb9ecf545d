"""Pictures of different shapes are trained in sizes of their own, whole, and SDXL's conditioning says their sizes."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageDraw

from personalize.embedded.scenes import Scene, SceneObject, render
from personalize.io.images import to_image
from personalize.training.data.buckets import as_fitted, fit, fit_into


def drawn(width: int, height: int, box: tuple[int, int, int, int]) -> tuple[Image.Image, Image.Image]:
    """A teal picture with a red subject in `box`, and its mask."""
    image, mask = Image.new("RGB", (width, height), "teal"), Image.new("L", (width, height))
    ImageDraw.Draw(image).rectangle(box, "red")
    ImageDraw.Draw(mask).rectangle(box, 255)
    return image, mask


def red(pixels: torch.Tensor) -> torch.Tensor:
    return (pixels[0, 0] > 0.5) & (pixels[0, 1] < 0)


def test_a_portrait_beside_a_landscape_keeps_its_head() -> None:
    """Both were cut to the square in their middle, where the head of a 2:3 portrait is not."""
    for width, height, head in (
        (400, 600, (150, 0, 250, 90)),
        (800, 500, (0, 200, 90, 300)),
        (500, 500, (0, 0, 60, 60)),
    ):
        image, _ = drawn(width, height, head)
        fitted = fit(image, None, 512, 64)
        assert all(side % 64 == 0 for side in fitted.size) and fitted.cut == ""
        h, w = fitted.unpadded_size
        share = red(fitted.pixels[..., :h, :w]).float().mean()
        whole = (head[2] - head[0] + 1) * (head[3] - head[1] + 1) / (width * height)
        assert abs(float(share) - whole) < 0.05 * whole  # its edge is blurred by a pixel


def test_padding_does_not_count_and_is_said() -> None:
    image, _ = drawn(400, 300, (0, 0, 50, 50))
    fitted = fit(image, None, 512, 64)
    (h, w), (height, width) = fitted.unpadded_size, fitted.size
    assert (height, width) == (448, 576) and (h, w) == (432, 576)
    assert fitted.padding == "padded by 16 px at the bottom"
    weights = fitted.weights(0.9)
    assert weights is not None and weights[0, 0].sum() == h * w and not weights[..., h:, :].any()
    assert torch.equal(fitted.pixels[..., h:, :], fitted.pixels[..., h - 17 : h - 1, :].flip(-2))  # reflected
    assert fit(image.resize((512, 512)), None, 512, 64).weights(0.9) is None


def test_a_cut_keeps_the_mask_whole_or_is_not_made() -> None:
    image, mask = drawn(400, 300, (0, 0, 60, 60))  # in a corner, that a cut in the middle would lose
    fitted = fit(image, mask, 512, 64)
    assert fitted.padding == "" and fitted.unpadded_size == fitted.size and fitted.corner == (0, 0)
    assert fitted.cut.startswith("cut by 3.6% at the right") and fitted.mask is not None
    assert float(fitted.mask[0, 0, :, 0].max()) > 0.99 and float(fitted.mask[0, 0, 0].max()) > 0.99
    wide, everywhere = drawn(400, 300, (0, 0, 399, 299))
    whole = fit(wide, everywhere, 512, 64)
    assert whole.cut == "" and whole.padding == "padded by 16 px at the bottom"


def test_sdxl_is_told_size_corner_and_target() -> None:
    image, mask = drawn(400, 300, (340, 0, 399, 60))
    assert fit(image, None, 512, 64).time_ids == (300, 400, 0, 0, 448, 576)
    cut = fit(image, mask, 512, 64)
    assert cut.time_ids == (300, 400, 0, cut.corner[1], 448, 576) and 18 <= cut.corner[1] <= 22
    assert as_fitted(torch.zeros(2, 3, 64, 96))[1].time_ids == (64, 96, 0, 0, 64, 96)
    assert to_image(cut.pixels).size == (576, 448)


def test_a_mirrored_picture_mirrors_its_weights() -> None:
    image, mask = drawn(300, 404, (0, 0, 299, 403))
    fitted = fit(image, mask, 512, 64)
    assert fitted.padding.endswith("at the right")
    weights, mirrored = fitted.weights(0.5), fitted.mirror().weights(0.5)
    assert weights is not None and mirrored is not None and torch.equal(mirrored, weights.flip(-1))
    assert torch.equal(fitted.mirror().pixels, fitted.pixels.flip(-1)) and float(mirrored[..., 0].max()) == 0


def test_a_mirrored_cut_says_its_corner_in_the_mirrored_picture() -> None:
    """As diffusers' script for SDXL, which mirrors first: 360 × 480 px scaled to 576 × 768, cut to 576 × 640."""
    image, mask = drawn(480, 360, (440, 40, 479, 160))  # 128 px are cut at one side
    for subject, (left, mirrored) in ((mask, (128, 0)), (mask.transpose(Image.Transpose.FLIP_LEFT_RIGHT), (0, 128))):
        cut = fit_into((576, 640), image, subject)
        assert cut.time_ids == (360, 480, 0, left, 576, 640)
        assert cut.mirror().time_ids == (360, 480, 0, mirrored, 576, 640)
        assert cut.mirror().mirror().corner == cut.corner
        flipped = fit_into((576, 640), *(p.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for p in (image, subject)))
        assert flipped.time_ids == cut.mirror().time_ids
    assert fit(image, None, 512, 64).mirror().time_ids == fit(image, None, 512, 64).time_ids


def test_the_subject_of_five_renders_in_three_shapes_is_whole_in_every_latent() -> None:
    """Windows of 1:1, 2:3 and 3:2 that hold all of the subject, which is near an edge of four of them."""
    windows = (
        ("beach", 0.5, 0.5, (0, 0, 300, 300)), ("snow", 0.35, 0.28, (10, 0, 210, 300)),
        ("grass", 0.3, 0.6, (0, 80, 300, 280)), ("night", 0.66, 0.7, (90, 0, 290, 300)),
        ("desert", 0.7, 0.4, (0, 20, 300, 220)),
    )  # fmt: skip
    sizes = set()
    for place, x, y, box in windows:
        picture, (subject,) = render(Scene(place, (SceneObject("teapot", "flat", x=x, y=y, size=0.5),)), 300)
        image, mask = Image.fromarray(picture).crop(box), Image.fromarray(subject).convert("L").crop(box)
        plain, masked = fit(image, None, 128, 32), fit(image, mask, 128, 32)
        sizes.add(plain.size)
        height, width = plain.unpadded_size
        fraction = np.asarray(mask.resize((width, height), Image.Resampling.BOX), np.float32) / 255
        weights = plain.weights(0.9)
        counted = np.ones(plain.size) if weights is None else weights[0, 0].numpy()
        assert plain.cut == "" and (counted[:height, :width][fraction > 0] == 1).all()
        assert masked.mask is not None and masked.cut.startswith("cut") == (plain.padding != "")
        scale = max(masked.size[0] / image.height, masked.size[1] / image.width)  # the picture covers its size
        assert abs(float(masked.mask.sum()) / (subject.sum() * scale**2) - 1) < 0.02  # resampling blurs the edge
    assert sizes == {(128, 128), (160, 96), (96, 160)}
