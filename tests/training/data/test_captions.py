"""Where the caption comes from, in order: given, beside the picture, a captioning model."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from personalize.errors import UserError
from personalize.models.prompts import align_prompt
from personalize.training.data.captions import find_caption, generate_caption


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.b.jpg")
    return tmp_path / "a.b.jpg"


def test_given_then_sidecar_then_error(photo: Path) -> None:
    with pytest.raises(UserError, match=r"--caption .*a\.b\.txt beside it.*--caption_model"):
        find_caption(photo)
    photo.with_name("a.b.txt").write_text("\ufeffa photo of\n  a dög \n", encoding="utf-8")
    assert find_caption(photo) == "a photo of a dög"
    assert find_caption(photo, " a  cat ") == "a cat"


def test_empty_or_unreadable_words_are_refused(photo: Path) -> None:
    with pytest.raises(UserError, match="caption from --caption is empty"):
        find_caption(photo, "  ")
    photo.with_name("a.b.txt").write_bytes("ein Käfer".encode("latin-1"))  # UTF-16 is read by its mark
    with pytest.raises(UserError, match="not UTF-8"):
        find_caption(photo)


def test_folder_that_is_no_captioning_model(photo: Path, tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match="no captioning model") as caught:
            find_caption(photo, caption_model=folder)
        assert "\n" not in str(caught.value)


@pytest.fixture
def blip(tmp_path: Path) -> Path:
    """A BLIP captioner of a few thousand random weights, with its processor, in a folder."""
    from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration, BlipImageProcessor, BlipProcessor

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]", "a", "dog", "red"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizer(str(tmp_path / "vocab.txt"), additional_special_tokens=["[DEC]", "[ENC]"])
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"bos_token_id": 5, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
    config = BlipConfig(
        text_config=small | ids | {"vocab_size": 10, "encoder_hidden_size": 16, "max_position_embeddings": 64},
        vision_config=small | {"image_size": 32, "patch_size": 16},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        captioner = BlipForConditionalGeneration(config)
    captioner.generation_config.max_new_tokens = 5
    captioner.text_decoder.generation_config.max_new_tokens = 5
    with torch.no_grad():
        captioner.text_decoder.cls.predictions.decoder.bias.copy_(torch.tensor([-99.0] * 7 + [0, 5, 1]))
    folder = tmp_path / "blip"
    captioner.save_pretrained(folder)
    size = {"height": 32, "width": 32}
    BlipProcessor(image_processor=BlipImageProcessor(size=size), tokenizer=tokenizer).save_pretrained(folder)
    return folder


def test_blip_folder_describes_the_picture(photo: Path, blip: Path) -> None:
    words = find_caption(photo, caption_model=blip).split()
    assert words and set(words) <= {"a", "dog", "red"}
    assert generate_caption(Image.new("RGB", (40, 30), "red"), blip).split() == words  # no sampling: the same again


@pytest.mark.parametrize(
    ("prompt", "caption", "worded"),
    [
        ("a dog in the snow", "a photo of a dog", "a photo of a dog in the snow"),
        ("a picture of a dog in the snow", "a photo of a dog", "a photo of a dog in the snow"),
        ("A photo of a dog in the snow", "a dog", "a dog in the snow"),
        ("a drawing of a dog", "a photo of a dog", "a drawing of a dog"),  # the edit itself
        ("a photo of a dog", "a drawing of a dog", "a photo of a dog"),  # likewise
        ("a picture of a dog", "a drawing of a dog", "a drawing of a dog"),
        ("a dog in the snow", "a drawing of a dog", "a drawing of a dog in the snow"),
        ("a dog", "", "a dog"),
        ("a photo of a dog", "a photo of a cat", "a photo of a dog"),
        ("a photo of a picture of a dog", "a dog", "a dog"),
        ("", "a photo of a dog", ""),
    ],
)
def test_the_target_begins_like_the_caption(prompt, caption, worded):
    """Rows of the two embeddings are compared by position, so their words must stand at the same ones."""
    assert align_prompt(prompt, caption) == worded == align_prompt(worded, caption)
