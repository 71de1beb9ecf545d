"""Folders of pictures are read as they are: every name, every kind of metadata, and a reason for what is left out."""

from __future__ import annotations

import codecs
import json
import os
import unicodedata
from pathlib import Path

import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from personalize.errors import UserError
from personalize.io.image_files import register_heif
from personalize.io.image_folders import FolderImage, ImageFolder, only_picture, read_folder
from personalize.io.image_metadata import sidecar_caption


def put(*paths: Path, size: tuple[int, int] = (20, 20)) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size).save(path)


def names(folder: ImageFolder) -> list[str]:
    return [str(image.path.relative_to(folder.path)) for image in folder.images]


@pytest.mark.parametrize("name", ["v[12]", "cats [best]", "a*b", "x::y", "100%", "{a,b}", "~", "猫", "a\nb"])
def test_a_folder_is_read_whatever_its_name(tmp_path: Path, name: str) -> None:
    """datasets reads `v[12]` as a pattern, which matches its neighbour v1."""
    put(tmp_path / name / "mine.png", tmp_path / "v1" / "other.png", tmp_path / "acb" / "other.png")
    assert names(read_folder(tmp_path / name)) == ["mine.png"]


def test_names_are_no_splits(tmp_path: Path) -> None:
    """datasets takes test, train, val, dev and eval in a name for a split, and returns one split alone."""
    given = ["contest.png", "dev.png", "dog-validation-02.png", "test/1.png", "test_dog.png", "training day.png"]
    put(*(tmp_path / name for name in given))
    assert names(read_folder(tmp_path)) == sorted(given)


def test_hidden_files_are_passed_over_without_a_word(tmp_path: Path) -> None:
    put(tmp_path / "1.png")
    for name in ("._1.png", ".DS_Store", "Thumbs.db", "__MACOSX/._1.png", ".trash/2.png", "desktop.ini"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"\0\5\26\7")
    folder = read_folder(tmp_path)
    assert names(folder) == ["1.png"] and not folder.left_out


def test_what_is_left_out_is_named_with_its_reason(tmp_path: Path) -> None:
    put(tmp_path / "1.png", tmp_path / "2.avif", tmp_path / "old" / "source.png")
    (tmp_path / "old" / "adapter.json").write_text("{}")
    (tmp_path / "page.jpg").write_text("<html>not found</html>")
    (tmp_path / "notes.pdf").write_bytes(b"%PDF")
    (tmp_path / "1.txt").write_text("a cat")
    (tmp_path / "one.txt").write_text("a cat")
    os.symlink("nothing.png", tmp_path / "link.png")
    os.mkfifo(tmp_path / "pipe.png")
    folder = read_folder(tmp_path)
    assert names(folder) == ["1.png", "2.avif"]
    assert folder.left_out == {
        "a link to nothing": ("link.png",),
        "a pipe or a device": ("pipe.png",),
        "written by this program (adapter.json)": ("old",),
        "no picture in spite of the name": ("page.jpg",),
        "no picture": ("notes.pdf",),
        "a caption without a picture of that name": ("one.txt",),
    }
    assert f"left out of {tmp_path}, no picture: notes.pdf" in folder.remarks()


def test_what_a_training_wrote_into_its_own_folder_is_not_learned(tmp_path: Path) -> None:
    """A second training learned the first one's reconstruction and validation pictures as pictures of the subject."""
    put(*(tmp_path / name for name in ("dog.png", "source.png", "reconstruction.png", "mine/source.png")))
    put(tmp_path / "validation" / "000020-1.png", tmp_path / "validation" / "dog.png")
    (tmp_path / "adapter.json").write_text(json.dumps({"files": ["adapter.json", "reconstruction.png", "source.png"]}))
    folder = read_folder(tmp_path)
    assert names(folder) == ["dog.png", "mine/source.png", "validation/dog.png"]
    assert {reason: set(names) for reason, names in folder.left_out.items()} == {
        "written by this program (adapter.json)": {"adapter.json", "reconstruction.png", "source.png"},
        "drawn while training": {"validation/000020-1.png"},
    }
    for damaged in ('{"files": 3', '{"files": 3}'):
        (tmp_path / "adapter.json").write_text(damaged)
        assert len(names(read_folder(tmp_path))) == 5


def test_heic_is_named_where_it_cannot_be_read(tmp_path: Path) -> None:
    put(tmp_path / "1.png")
    (tmp_path / "2.heic").write_bytes(b"\0\0\0\x18ftypheic")
    ((reason, files),) = read_folder(tmp_path).left_out.items()
    assert files == ("2.heic",) and ("no picture" if register_heif() else "pip install 'personalize[heic]'") in reason


@pytest.mark.skipif(not register_heif(), reason="pillow-heif is not installed")
def test_heic_is_read(tmp_path: Path) -> None:
    put(tmp_path / "a.heic", size=(64, 48))
    (one,) = read_folder(tmp_path).images
    assert only_picture(tmp_path) == one.path


def test_links_that_lead_back_up_end(tmp_path: Path) -> None:
    put(tmp_path / "a" / "1.png")
    os.symlink(tmp_path, tmp_path / "a" / "up")
    assert names(read_folder(tmp_path)) == ["a/1.png"]


ROWS = [{"file_name": "b.png", "text": "a dog", "mask_file_name": "m.png"}, {"file_name": "a.png", "text": "a cät"}]


def write_metadata(folder: Path, kind: str) -> None:
    if kind == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "metadata.parquet")
    elif kind == "csv":
        text = "file_name,text,mask_file_name\nb.png,a dog,m.png\na.png,a cät,\n"
        (folder / "metadata.csv").write_text(text, encoding="utf-8-sig")
    else:
        text = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n\n"
        (folder / "metadata.jsonl").write_text(text, encoding="utf-16")


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_metadata_of_every_kind(tmp_path: Path, kind: str) -> None:
    put(*(tmp_path / name for name in ("a.png", "b.png", "c.png", "m.png")))
    write_metadata(tmp_path, kind)
    a, b, c = read_folder(tmp_path).images  # the mask is no picture of the folder's; c.png is in no row
    assert (a.path.name, a.columns["text"], a.files) == ("a.png", "a cät", {})
    assert (b.path.name, b.columns["text"], b.files) == ("b.png", "a dog", {"mask_file_name": tmp_path / "m.png"})
    assert c == FolderImage(tmp_path / "c.png")


def test_metadata_in_subfolders_and_with_other_spellings(tmp_path: Path) -> None:
    composed, apart = "caf\u00e9.png", unicodedata.normalize("NFD", "caf\u00e9.png")
    put(tmp_path / "x" / apart, tmp_path / "x" / "y" / "2.png")
    rows = [{"file_name": composed, "text": "coffee"}, {"file_name": "y\\2.png", "text": "two"}]
    (tmp_path / "x" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert [image.columns["text"] for image in read_folder(tmp_path).images] == ["coffee", "two"]


def test_a_picture_with_two_captions_is_there_twice(tmp_path: Path) -> None:
    put(tmp_path / "1.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\n1.png,a cat\n1.png,a black cat\n")
    assert [image.columns["text"] for image in read_folder(tmp_path).images] == ["a cat", "a black cat"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"file_name": "1.png"}\n{"file_name": "2.png"}', "line 2 names 2.png, which is not in"),
        ('{"file_name": "../1.png"}', "line 1 names ../1.png, which is outside"),
        ('{"file_name": "/etc/passwd"}', "which is outside"),
        ('{"text": "a cat"}', "line 1: it has columns text, expected a column file_name"),
        ('{"file_name": 3}', "line 1: it has file_name 3"),
        ('[1]', "line 1 holds a list"),
        ('{"file_name": "1.png"', "line 1 is no JSON"),
    ],
)  # fmt: skip
def test_metadata_that_cannot_be_used_is_named_by_its_line(tmp_path: Path, text: str, says: str) -> None:
    put(tmp_path / "1.png")
    (tmp_path / "metadata.jsonl").write_text(text)
    with pytest.raises(UserError, match="metadata.jsonl, ") as caught:
        read_folder(tmp_path)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_two_metadata_files_and_other_mistakes(tmp_path: Path) -> None:
    put(tmp_path / "1.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\n1.png,a cat, sitting\n")
    with pytest.raises(UserError, match="line 2 has more cells"):
        read_folder(tmp_path)
    (tmp_path / "metadata.csv").write_text("file_name\n1.png\n")
    (tmp_path / "metadata.parquet").write_bytes(b"PAR0")
    with pytest.raises(UserError, match="cannot be read as Parquet|keep one of them"):
        read_folder(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty holds no picture"):
        read_folder(tmp_path / "empty")
    with pytest.raises(UserError, match="no such folder"):
        read_folder(tmp_path / "missing")


@pytest.mark.parametrize("name", ["1.txt", "1.caption", "1.png.txt", "1.png.caption", "1.TXT"])
@pytest.mark.parametrize(
    "content", ["ein Käfer\n".encode(), codecs.BOM_UTF8 + "ein Käfer".encode(), "ein\r\nKäfer".encode("utf-16"),
                codecs.BOM_UTF16_BE + "ein Käfer".encode("utf-16-be")],
)  # fmt: skip
def test_captions_beside_the_picture(tmp_path: Path, name: str, content: bytes) -> None:
    put(tmp_path / "1.png")
    assert sidecar_caption(tmp_path / "1.png") is None
    (tmp_path / name).write_bytes(content)
    assert sidecar_caption(tmp_path / "1.png") == "ein Käfer"
    assert not read_folder(tmp_path).left_out


def test_captions_that_cannot_be_read(tmp_path: Path) -> None:
    put(tmp_path / "1.png")
    for content in ("Käfer".encode("latin-1"), "a cat".encode("utf-16-le"), "a cat".encode("utf-32-be")):
        (tmp_path / "1.txt").write_bytes(content)
        with pytest.raises(UserError, match="1.txt is not UTF-8"):
            sidecar_caption(tmp_path / "1.png")
    (tmp_path / "1.txt").write_text(" \n")
    with pytest.raises(UserError, match="1.txt is empty"):
        sidecar_caption(tmp_path / "1.png")


def test_only_picture(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        only_picture(tmp_path / "missing.png")
    put(tmp_path / "a.PNG")
    (tmp_path / "._a.png").write_bytes(b"\0\5\26\7")
    assert only_picture(tmp_path) == only_picture(tmp_path / "a.PNG") == tmp_path / "a.PNG"
    put(tmp_path / "b.png")
    with pytest.raises(UserError, match="exactly one picture, found 2"):
        only_picture(tmp_path)
