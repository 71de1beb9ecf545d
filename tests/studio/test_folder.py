"""Files are read and written only under the folder that the studio was started in."""

from __future__ import annotations

import os
from base64 import b64encode
from io import BytesIO

import pytest
from PIL import Image

from personalize.errors import UserError
from personalize.studio.folder import Folder


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "start" / "pictures").mkdir(parents=True)
    Image.new("RGB", (32, 32), "red").save(tmp_path / "start" / "pictures" / "cat.png")
    Image.new("RGB", (32, 32), "blue").save(tmp_path / "secret.png")
    return Folder(tmp_path / "start")


def sent(folder, name, content):
    path = folder.uploads / "abc" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return str(path)


def png_bytes(size=(32, 32), colour="red"):
    stream = BytesIO()
    Image.new("RGB", size, colour).save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize(
    "path",
    ["../secret.png", "pictures/../../secret.png", "/etc/passwd", "~/x.png", "..\\secret.png", "C:\\x.png", "", "a\0b",
     "-x.png"],
)  # fmt: skip
def test_a_path_that_leads_outside_is_refused(folder, path):
    with pytest.raises(UserError, match="folder of the studio"):
        folder.inside(path)


def test_an_absolute_path_is_refused_even_if_it_lies_inside(folder):
    with pytest.raises(UserError, match="outside"):
        folder.inside(folder.root / "pictures" / "cat.png")


@pytest.mark.parametrize("target", ["secret.png", "start/pictures/cat.png"], ids=["outside", "inside"])
def test_a_symbolic_link_is_refused_wherever_it_leads(folder, target):
    link = folder.root / "link.png"
    os.symlink(folder.root.parent / target, link)
    with pytest.raises(UserError, match="symbolic link"):
        folder.existing("link.png")
    assert folder.pictures() == ["pictures/cat.png"]


def test_a_linked_folder_is_refused_with_all_that_is_in_it(folder):
    os.symlink(folder.root.parent, folder.root / "up", target_is_directory=True)
    with pytest.raises(UserError, match="symbolic link"):
        folder.existing("up/secret.png")
    assert folder.pictures() == ["pictures/cat.png"]


def test_what_was_sent_gets_a_plain_name_and_replaces_nothing(folder):
    first = folder.keep_upload(sent(folder, "my cat?.png", png_bytes()))
    again = folder.keep_upload(sent(folder, "my cat?.png", png_bytes()))
    other = folder.keep_upload(sent(folder, "my cat?.png", png_bytes(colour="blue")))
    assert str(first) == "studio/pictures/my_cat_.png"
    assert again == first
    assert str(other) == "studio/pictures/my_cat_-2.png"


def test_only_what_the_page_sent_is_taken(folder):
    for path in ("secret.png", "start/pictures/cat.png"):
        with pytest.raises(UserError, match="not sent by the page"):
            folder.keep_upload(str(folder.root.parent / path))


def test_a_text_file_as_picture_gets_one_line_without_a_path(folder):
    with pytest.raises(UserError, match=r"^notes\.txt is not a picture") as caught:
        folder.keep_upload(sent(folder, "notes.txt", b"hello"))
    assert "\n" not in str(caught.value)
    assert not (folder.root / "studio" / "pictures").exists()


def test_a_picture_of_200_megapixels_is_refused_by_its_header(folder):
    content = bytearray(png_bytes())
    content[16:24] = (20_000).to_bytes(4, "big") + (10_000).to_bytes(4, "big")
    from zlib import crc32

    content[29:33] = crc32(bytes(content[12:29])).to_bytes(4, "big")
    with pytest.raises(UserError, match="150 million pixels"):
        folder.keep_upload(sent(folder, "huge.png", bytes(content)))


def test_a_painted_mask_is_kept_as_a_picture_and_nothing_else(folder):
    path = folder.keep_mask("data:image/png;base64," + b64encode(png_bytes()).decode())
    assert str(path) == "studio/masks-001/mask.png"
    for wrong in ("data:text/html;base64,AAAA", "http://elsewhere/x.png", "data:image/png;base64,AAAA"):
        with pytest.raises(UserError):
            folder.keep_mask(wrong)


def test_names_that_are_no_utf_8_are_left_out(folder):
    (folder.root / "fine").mkdir()
    for place in (
        b"caf\xe9.png",
        b"caf\xe9/cat.png",
        b"caf\xe9/adapter.json",
        b"caf\xe9/model_index.json",
        b"fine/\xe9.pt",
    ):
        path = folder.root / os.fsdecode(place)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(png_bytes())
    assert folder.pictures() == ["pictures/cat.png"]
    assert folder.adapter_files() == folder.bases() == []


def test_an_adapter_file_is_listed_whatever_the_case_of_its_ending(folder):
    for name in ("CAT.SAFETENSORS", "dog.safetensors"):
        (folder.root / name).write_bytes(b"")
    assert set(folder.adapter_files()) == {"CAT.SAFETENSORS", "dog.safetensors"}


def test_new_folders_are_numbered_on_and_none_is_given_twice(folder):
    assert str(folder.new_folder("drag")) == "studio/drag-001"
    assert str(folder.new_folder("drag")) == "studio/drag-002", "the first is taken though nothing is in it yet"
    with pytest.raises(UserError), folder.folder_for("drag") as path:
        raise UserError(f"{path} is not needed")
    assert str(folder.new_folder("drag")) == "studio/drag-003"
    assert [path.name for path in (folder.root / "studio").iterdir() if any(path.iterdir())] == []
