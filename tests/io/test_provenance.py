"""What pictures say of themselves, in PNG, JPEG and WebP, read by Pillow and by exiftool."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from personalize.errors import UserError
from personalize.io.provenance import Provenance, parameters_text, photo_exif, picture_bytes, read_marks

DETAILS = {
    "command": "edit", "prompt": "a cat <b> & ünï\n--- \U0001f431", "negative_prompt": "bad", "steps": 20,
    "scheduler": "ddim", "guidance_scale": 7.5, "seed": 3, "size": "512x448", "version": "0.1.0",
    "base": {"name": "sd15", "sha256": "ab" * 32},
    "adapters": [{"name": 'my "cat", 2', "sha256": "ab" * 32, "lora_hash": "01" * 32}],
}  # fmt: skip
KINDS = ("PNG", "JPEG", "WEBP")


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (48, 64, 3), dtype=np.uint8))


def written(tmp_path, kind: str, mark: Provenance):
    path = tmp_path / f"picture.{kind.lower()}"
    path.write_bytes(picture_bytes(picture(), mark, kind))
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_marks_come_back_from_each_kind_of_file_and_from_a_copy(kind: str, tmp_path):
    mark = Provenance("compositeWithTrainedAlgorithmicMedia", DETAILS)
    path = written(tmp_path, kind, mark)
    found = read_marks(shutil.copy(path, tmp_path / f"copy.{kind.lower()}"))
    assert found.source_type.endswith("/compositeWithTrainedAlgorithmicMedia")
    assert found.details == DETAILS and found.parameters == parameters_text(DETAILS)
    assert picture_bytes(picture(), mark, kind) == path.read_bytes(), "equal arguments give equal bytes"
    if kind != "JPEG":
        assert np.array_equal(np.asarray(Image.open(path)), np.asarray(picture()))


def test_the_parameters_are_in_the_form_of_a1111():
    assert parameters_text(DETAILS).splitlines() == [
        "a cat <b> & ünï --- \U0001f431",
        "Negative prompt: bad",
        "Steps: 20, Sampler: ddim, CFG scale: 7.5, Seed: 3, Size: 512x448, Model: sd15, "
        'Lora hashes: "my _cat__ 2: 010101010101", Version: personalize 0.1.0',
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mark", [Provenance(None), Provenance(), Provenance(None, DETAILS)])
def test_what_is_left_out_is_not_there(kind: str, mark: Provenance, tmp_path):
    found = read_marks(written(tmp_path, kind, mark))
    assert (found.source_type is None) == (mark.source_type is None)
    assert (found.details is None) == (found.parameters is None) == (mark.details is None)
    content = (tmp_path / f"picture.{kind.lower()}").read_bytes()
    assert (b"010101" in content or "010101".encode("utf-16-be") in content) == (mark.details is not None)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_the_source_photo_goes_along_but_exif_that_is_asked_for(kind: str, tmp_path):
    exif = Image.Exif()
    exif[0x0112], exif[0x013B] = 6, "Secret Owner"
    photo = tmp_path / "photo.jpg"
    picture().save(photo, exif=exif, icc_profile=b"Secret Profile", comment="Secret Comment")
    opened = Image.open(photo)
    assert b"Secret" not in picture_bytes(opened, Provenance(), kind)
    kept = tmp_path / f"kept.{kind.lower()}"
    kept.write_bytes(picture_bytes(opened, Provenance(exif=photo_exif(photo)), kind))
    again = Image.open(kept).getexif()
    assert again[0x013B] == "Secret Owner" and 0x0112 not in again, "the picture is upright already"


def test_exif_of_a_tiff_is_about_the_photo_and_not_about_its_strips(tmp_path):
    exif = Image.Exif()
    exif[0x013B] = "Secret Owner"
    picture().save(tmp_path / "photo.tif", exif=exif)
    kept = Image.Exif()
    kept.load(photo_exif(tmp_path / "photo.tif"))
    assert kept[0x013B] == "Secret Owner" and 0x0111 not in kept


def test_exif_is_kept_of_all_that_can_be_edited_and_damage_is_one_line(tmp_path, monkeypatch):
    """A PNG with 3 MB of text was read as a photo, and its EXIF ended in a fault of ours."""
    texts, exif = PngImagePlugin.PngInfo(), Image.Exif()
    texts.add_text("a", "x" * 3_000_000, zip=True)
    exif[0x013B] = "Secret Owner"
    picture().save(tmp_path / "photo.png", pnginfo=texts, exif=exif)
    kept = Image.Exif()
    kept.load(photo_exif(tmp_path / "photo.png"))
    assert kept[0x013B] == "Secret Owner"

    def damaged(self, *args):
        raise struct.error("unpack requires a buffer of 4 bytes")

    monkeypatch.setattr(Image.Exif, "tobytes", damaged)
    with pytest.raises(UserError, match="photo.png: its EXIF data is damaged .*: leave --keep_exif out"):
        photo_exif(tmp_path / "photo.png")


@pytest.mark.skipif(shutil.which("exiftool") is None, reason="exiftool is not installed")
@pytest.mark.parametrize("kind", KINDS)
def test_exiftool_reads_the_marks(kind: str, tmp_path):
    path = written(tmp_path, kind, Provenance("trainedAlgorithmicMedia", DETAILS))
    found = json.loads(subprocess.run(["exiftool", "-j", "-G1", path], capture_output=True, check=True).stdout)[0]
    assert found["XMP-iptcExt:DigitalSourceType"].endswith("digitalsourcetype/trainedAlgorithmicMedia")
    text = found["PNG:Parameters" if kind == "PNG" else "ExifIFD:UserComment"]
    assert text.startswith("a cat <b> & ünï") and "Seed: 3" in text


def test_marks_of_others_are_read_and_damaged_ones_are_named(tmp_path):
    xmp = (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        '<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" '
        'Iptc4xmpExt:DigitalSourceType="http://cv.iptc.org/newscodes/digitalsourcetype/digitalCapture"/>'
        "</rdf:RDF></x:xmpmeta>"
    )
    path = tmp_path / "other.jpg"
    picture().save(path, xmp=xmp.encode())
    assert read_marks(path).source_type.endswith("/digitalCapture")
    bomb = xmp.replace("<x:xmpmeta", '<!DOCTYPE a [<!ENTITY b "c">]><x:xmpmeta')
    picture().save(path, xmp=bomb.encode())
    assert not read_marks(path)
    for text in ("{", "[1]", "[" * 100_000, '"' + "a" * (1 << 21) + '"'):
        info = PngImagePlugin.PngInfo()
        info.add_text("personalize", text)
        picture().save(tmp_path / "bad.png", pnginfo=info)
        with pytest.raises(UserError, match="settings are damaged"):
            read_marks(tmp_path / "bad.png")
    (tmp_path / "no.png").write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be read as a picture"):
        read_marks(tmp_path / "no.png")
