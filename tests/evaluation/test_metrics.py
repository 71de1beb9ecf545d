"""Metrics of edits, on pictures made by hand and tiny networks."""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, ViTConfig, ViTModel

from personalize.evaluation.metrics import (
    ClipScore,
    ImagePair,
    Lpips,
    Structure,
    metrics,
    mse,
    or_unavailable,
    psnr,
    ssim,
)
from personalize.evaluation.networks import Unavailable
from personalize.training.pretraining.networks import build_tokenizer
from tests.support.tiny import WORDS

needs_torchmetrics = pytest.mark.skipif(importlib.util.find_spec("torchmetrics") is None, reason="needs torchmetrics")
needs_lpips = pytest.mark.skipif(importlib.util.find_spec("lpips") is None, reason="needs lpips")


def picture(seed: int = 0, side: int = 32) -> torch.Tensor:
    return torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(seed))


def left_half(side: int = 32) -> torch.Tensor:
    mask = torch.zeros(side, side, dtype=torch.bool)
    mask[:, : side // 2] = True
    return mask


@pytest.fixture(scope="module")
def vit(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("vit")
    ViTModel(
        ViTConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=32,
            patch_size=8,
        )
    ).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    folder, tokenizer = tmp_path_factory.mktemp("clip"), build_tokenizer(WORDS)
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {
        **tower,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 77,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config = CLIPConfig(text_config=text, vision_config={**tower, "image_size": 32, "patch_size": 8}, projection_dim=8)
    CLIPModel(config).save_pretrained(folder)
    sides = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPProcessor(CLIPImageProcessor(**sides), tokenizer).save_pretrained(folder)
    return str(folder)


def test_uniform_u8_equal_pictures():
    one = picture()
    assert mse(one, one) == 0 and psnr(one, one) == math.inf


def test_uniform_u8_the_whole_frame_flatters_by_the_share_of_the_background():
    """Whole-frame PSNR of masked pictures = PSNR of the region + 10 log₁₀(total / background), exactly."""
    mask = left_half()
    mask[:, :24] = True  # a quarter is background
    pair = ImagePair(picture(0), picture(1), mask)
    region = psnr(pair.source[..., 24:], pair.edited[..., 24:])
    assert psnr(*pair.background()) == pytest.approx(region + 10 * math.log10(4), abs=1e-9)


def test_dpl_c08_masked_metrics_ignore_what_is_inside_the_mask():
    source, edited = picture(), picture()
    edited[..., :16] = 0.3
    assert psnr(*ImagePair(source, edited, left_half()).background()) == math.inf
    assert psnr(source, edited) < 20  # companion: without the mask the edit counts as damage


def test_uniform_u8_without_background_there_is_no_number():
    for mask, words in ((None, "no mask"), (torch.ones(32, 32, dtype=torch.bool), "no background")):
        with pytest.raises(Unavailable, match=words):
            ImagePair(picture(), picture(), mask).background()


@needs_torchmetrics
def test_uniform_u8_ssim():
    """1 for equal pictures; torchmetrics computes in fp32, so 1e-5."""
    assert ssim(picture(), picture()) == pytest.approx(1, abs=1e-5) and ssim(picture(), picture(1)) < 0.5


def test_uniform_u8_structure_distance(vit: str):
    """0 for equal pictures; the keys are the last block's, heads concatenated."""
    structure = Structure(vit)
    assert structure(picture(), picture()) == 0 and structure(picture(), 1 - picture()) > 0
    assert structure.layer is structure.model.layers[-1].attention.k_proj
    cosines = structure.similarities(picture(side=64))
    assert cosines.shape == (
        1,
        1 + 28 * 28,
        1 + 28 * 28,
    )  # 224 px in patches of 8, and the class token: 785 as published
    torch.testing.assert_close(cosines.diagonal(dim1=1, dim2=2), torch.ones(1, 785))


def test_clip_score_is_a_hundred_times_the_cosine_and_never_negative(clip: str):
    score = ClipScore(clip)
    values = []
    for _ in range(2):  # a picture for and a picture against the text
        values.append([score(picture(seed), text) for seed in range(2) for text in ("a cat", "a dog on the beach")])
        score.model.visual_projection.weight.data.mul_(-1)
    assert all(min(pair) == 0 < max(pair) <= 100 for pair in zip(*values, strict=True))


def test_columns_say_why_they_are_missing(vit: str, clip: str):
    gone = or_unavailable(lambda: Structure("nowhere/at-all"))
    assert isinstance(gone, Unavailable) and "cannot be loaded" in str(gone)
    columns = metrics(gone, or_unavailable(lambda: ClipScore(clip)), or_unavailable(lambda: Lpips(None)))
    assert [column.name for column in columns][:7] == ["structure", "psnr", "lpips", "mse", "ssim", "clip whole",
                                                       "clip edited"]  # fmt: skip
    pair = ImagePair(picture(), picture(1), left_half(), "a cat", "a dog")
    by_name = {column.name: column for column in columns}
    with pytest.raises(Unavailable, match="cannot be loaded"):
        by_name["structure"].measure(pair)
    with pytest.raises(Unavailable, match="lpips"):
        by_name["lpips"].measure(pair)
    assert by_name["clip whole"].measure(pair) >= 0 and by_name["clip edited"].measure(pair) >= 0
    with pytest.raises(Unavailable, match="no prompt"):
        by_name["clip whole"].measure(ImagePair(picture(), picture()))
    with pytest.raises(Unavailable, match="no mask"):
        by_name["clip edited"].measure(ImagePair(picture(), picture(), None, "", "a dog"))
    for kind in (Structure, ClipScore):
        with pytest.raises(Unavailable, match="name a folder or hub id"):
            kind(None)


@needs_lpips
def test_uniform_u8_lpips(tmp_path):
    """0 for equal pictures; with random weights in the place of the backbone's, laid out as torchvision's file."""
    from torchvision.models import squeezenet1_1

    file = tmp_path / "squeezenet1_1.pth"
    torch.save(squeezenet1_1(weights=None).state_dict(), file)
    distance = Lpips(file)
    assert distance(picture(side=64), picture(side=64)) == 0 and distance(picture(side=64), picture(1, side=64)) > 0
    torch.save({"features.0.weight": torch.zeros(1)}, file)
    with pytest.raises(Unavailable, match="is not torchvision's squeezenet1_1"):
        Lpips(file)
