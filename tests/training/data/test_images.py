"""The pictures of a subject: one file, a folder, a data set; a caption each, and masks."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from personalize.cli.launch import load_script
from personalize.errors import UserError
from personalize.io.image_folders import FolderImage
from personalize.training.data.class_images import from_dataset
from personalize.training.data.images import TrainingImage, read_training_images
from personalize.training.data.sources import MASK_FILE, with_masks

SCRIPT = load_script(Path(__file__).parents[3] / "train" / "single_image.py")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two pictures of different shapes, a mask for the second, and words for the first alone."""
    place = tmp_path / "subject"
    place.mkdir()
    cut_out = Image.new("RGBA", (90, 60), (255, 0, 0, 0))  # transparent: white once it is read
    cut_out.putpixel((5, 5), (255, 255, 255, 255))
    cut_out.save(place / "a.png")
    Image.linear_gradient("L").resize((64, 96)).convert("RGB").save(place / "b.jpg")
    mask = Image.new("L", (64, 96), 255)
    mask.paste(0, (0, 0, 64, 8))
    mask.save(tmp_path / "mask.png")
    return place


def tell(folder: Path, *rows: dict[str, Any]) -> None:
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


def read(**options: Any) -> list[TrainingImage]:
    return read_training_images(SCRIPT.Config(**options))


def test_one_file_with_a_mask(folder: Path) -> None:
    mask = folder.parent / "mask.png"
    (one,) = read(picture=(folder / "b.jpg",), caption="a  dog", instance_mask=mask)
    assert one.caption == "a dog" and one.mask is not None
    with pytest.raises(UserError, match="is 64×96 px, the picture 90×60"):
        read(picture=(folder / "a.png",), caption="a dog", instance_mask=mask)
    Image.new("L", (64, 96)).save(mask)
    with pytest.raises(UserError, match="black everywhere"):
        read(picture=(folder / "b.jpg",), caption="a dog", instance_mask=mask)


@pytest.mark.parametrize("how", ["picture", "dataset_name"])
def test_the_mask_of_a_cut_out_is_what_is_opaque(folder: Path, how: str) -> None:
    """It was composited on white, and so white everywhere."""
    image = Image.new("RGBA", (64, 96), (255, 255, 255, 0))
    image.paste((255, 255, 255, 255), (16, 16, 48, 48))
    image.save(folder / "m.png")
    tell(folder, {"file_name": "b.jpg", "text": "a dog", "mask_file_name": "m.png"})
    (one,) = read(**({"picture": (folder,)} if how == "picture" else {"dataset_name": str(folder)}))
    assert one.mask is not None and one.mask.getbbox() == (16, 16, 48, 48) and one.mask.mode == "L"


@pytest.mark.parametrize("how", ["picture", "instance_data_dir", "dataset_name"])
def test_a_folder_with_metadata(folder: Path, how: str) -> None:
    Image.open(folder.parent / "mask.png").save(folder / "m.png")
    words = [{"file_name": "a.png", "text": "a cat"}, {"file_name": "b.jpg", "text": "a dog in a park"}]
    tell(folder, *({**row, "mask_file_name": "m.png" if "b" in row["file_name"] else None} for row in words))
    given = {"picture": (folder,), "instance_data_dir": folder, "dataset_name": str(folder)}[how]
    first, second = read(**{how: given}, caption="not this")
    assert (first.caption, second.caption) == ("a cat", "a dog in a park")
    assert first.mask is None and second.mask is not None and second.mask.size == (64, 96)
    assert first.image.getpixel((0, 0)) == (255, 255, 255)


def test_words_beside_the_pictures_or_for_all(folder: Path) -> None:
    (folder / "b.txt").write_text("a dog\n")
    assert [one.caption for one in read(instance_data_dir=folder, caption="a pet")] == ["a pet", "a dog"]
    with pytest.raises(UserError, match=r"a\.png has no caption"):
        read(instance_data_dir=folder)


def test_several_files_and_folders(folder: Path) -> None:
    (folder / "b.txt").write_text("a dog")
    images = read(picture=(folder / "a.png", folder / "b.jpg", folder), caption="a pet")
    assert [one.caption for one in images] == ["a pet", "a dog", "a pet", "a dog"]
    with pytest.raises(UserError, match="a mask belongs to one picture"):
        read(picture=(folder / "a.png", folder / "b.jpg"), caption="a", instance_mask=folder / "a.png")


def test_a_picture_that_is_named_twice_has_a_mask_each_time(folder: Path) -> None:
    """Both had the last one."""
    picture, masks = folder / "b.jpg", [folder.parent / "mask.png", folder / "a.png"]
    images = with_masks([FolderImage(picture)] * 2, masks)
    assert [image.files[MASK_FILE] for image in images] == masks


def test_a_mask_belongs_to_one_of_several_pictures_of_its_name(folder: Path) -> None:
    """Pictures of two folders shared it without a word."""
    (folder.parent / "masks").mkdir()
    (folder.parent / "mask.png").rename(folder.parent / "masks" / "b.png")
    other = folder.parent / "other"
    other.mkdir()
    Image.new("RGB", (64, 96)).save(other / "b.png")
    masks = {"caption": "a dog", "instance_mask": folder.parent / "masks"}
    with pytest.raises(UserError, match=r"b\.png is by its name the mask of .*b\.jpg and of .*b\.png"):
        read(picture=(folder / "b.jpg", other), **masks)
    Image.open(folder / "b.jpg").save(folder / "b.webp")  # the same photo in two formats
    assert all(image.mask is not None for image in read(picture=(folder / "b.jpg", folder / "b.webp"), **masks))


def test_every_row_of_a_picture_needs_a_caption(folder: Path) -> None:
    """The last row's was taken for all of them, until the pictures were read."""
    tell(folder, {"file_name": "a.png"}, {"file_name": "a.png", "text": "a cat"})
    with pytest.raises(UserError, match=r"a\.png has no caption"):
        SCRIPT.Config(instance_data_dir=folder).check()


def test_a_caption_that_is_no_text_is_refused(folder: Path) -> None:
    tell(folder, {"file_name": "a.png", "text": 3}, {"file_name": "b.jpg"})
    with pytest.raises(UserError, match="line 1: text holds 3, expected the caption in words"):
        read(instance_data_dir=folder, caption="a pet")


def test_captions_of_a_data_set_that_are_no_text_are_refused(folder: Path) -> None:
    """A list of captions was learned as it is written, with brackets and quotes, and a class by its number."""
    tell(folder, {"file_name": "a.png", "text": ["a cat", "a pet"]}, {"file_name": "b.jpg", "text": ["a dog"]})
    said = r"picture 1: text holds \['a cat', 'a pet'\], expected the caption in words"
    with pytest.raises(UserError, match=said):
        read(dataset_name=str(folder))
    with pytest.raises(UserError, match=said):
        from_dataset(str(folder), "a pet", 2, image_column="image", caption_column="text")
    tell(folder, {"file_name": "a.png", "text": 3}, {"file_name": "b.jpg", "text": 4})
    with pytest.raises(UserError, match="picture 1: text holds 3, expected"):
        read(dataset_name=str(folder), caption="a pet")


def test_rows_of_a_data_set_without_a_picture_are_named(folder: Path, tmp_path: Path) -> None:
    """They, and a column "mask" that holds no pictures, ended in a fault of ours."""
    from datasets import Dataset, Features, Value
    from datasets import Image as Picture

    picture, place = {"bytes": (folder / "b.jpg").read_bytes(), "path": None}, tmp_path / "rows"
    place.mkdir()
    features = Features({"image": Picture(), "text": Value("string"), "mask": Value("string")})
    for images, masks, says in (
        ([picture, None], [None, None], "rows, picture 2 holds nothing, expected a picture in .*: leave out its row"),
        ([picture, picture], [None, "b.png"], "the mask of .*rows, picture 2 is 'b.png', expected .* column 'mask'"),
    ):
        rows = {"image": images, "text": ["a", "b"], "mask": masks}
        Dataset.from_dict(rows, features=features).to_parquet(place / "rows.parquet")
        with pytest.raises(UserError, match=says):
            read(dataset_name=str(place))


def test_a_caption_column_that_a_data_set_lacks_is_named_with_those_that_it_has(folder: Path) -> None:
    """The message sent the user to text files and metadata.jsonl; and with --caption nothing was said."""
    tell(folder, {"file_name": "a.png", "prompt": "a cat"}, {"file_name": "b.jpg", "prompt": "a dog"})
    with pytest.raises(UserError, match="no caption in column 'text'; the data set's columns are image, prompt: name"):
        read(dataset_name=str(folder))
    with pytest.raises(UserError, match="no caption in column 'promt'; the data set's columns are image, prompt: name"):
        read(dataset_name=str(folder), caption_column="promt", caption="a pet")
    assert [one.caption for one in read(dataset_name=str(folder), caption_column="prompt")] == ["a cat", "a dog"]
    classes = {"caption_column": "words", "class_dataset_name": "x"}  # the column of the class pictures
    assert [one.caption for one in read(dataset_name=str(folder), caption="a pet", **classes)] == ["a pet"] * 2


def test_a_picture_that_no_row_names_takes_the_caption_of_all(folder: Path) -> None:
    """datasets leaves it out without a word."""
    tell(folder, {"file_name": "a.png", "animal": "a cat"})
    images = read(instance_data_dir=folder, caption="a pet", caption_column="animal")
    assert [one.caption for one in images] == ["a cat", "a pet"]


def test_a_changed_folder_is_read_anew(folder: Path) -> None:
    tell(folder, {"file_name": "a.png", "text": "a cat"})
    assert [one.caption for one in read(instance_data_dir=folder)] == ["a cat"]
    tell(folder, {"file_name": "a.png", "text": "a cow"})
    assert [one.caption for one in read(instance_data_dir=folder)] == ["a cow"]


def test_what_cannot_be_read(folder: Path) -> None:
    for options, message in (
        ({}, "got none of picture"),
        ({"picture": (folder / "a.png",), "dataset_name": "x"}, "got 2"),
        ({"dataset_name": "no/such-set"}, "cannot be loaded"),
        ({"instance_data_dir": folder, "instance_mask": folder / "a.png"}, "belongs to one picture"),
        ({"instance_data_dir": folder, "instance_mask": folder}, "holds the pictures themselves"),
        ({"instance_data_dir": folder, "image_column": "photo", "caption": "a"}, "image_column photo is for data sets"),
        ({"dataset_name": str(folder), "image_column": "photo", "caption": "a"}, "no pictures in column 'photo'"),
        ({"instance_data_dir": folder.parent / "nowhere"}, "no such file or folder"),
    ):
        with pytest.raises(UserError, match=message):
            read(**options)
    empty = folder.parent / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="empty"):
        read(instance_data_dir=empty)


def test_a_folder_read_as_a_data_set_asks_nothing_of_the_network(folder: Path, monkeypatch) -> None:
    """🤗 datasets counts each load at the hub."""
    from datasets import config, load

    counted = []
    for name in ("HF_HUB_OFFLINE", "HF_UPDATE_DOWNLOAD_COUNTS"):
        monkeypatch.setattr(config, name, name != "HF_HUB_OFFLINE")
    monkeypatch.setattr(load, "get_session", lambda: counted.append("asked") or 1 / 0, raising=False)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *place, **_: counted.append(place) or 1 / 0)
    assert len(read(dataset_name=str(folder), caption="a pet")) == 2 and counted == []
    assert not config.HF_HUB_OFFLINE and config.HF_UPDATE_DOWNLOAD_COUNTS, "left as they were"
