"""The marks of what commands write: read back, drawn again, left out, signed; and nothing personal beside them."""

from __future__ import annotations

import json
import re
import shutil
from datetime import UTC, datetime, timedelta
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

from personalize.cli.commands.marks import PictureWriter
from personalize.cli.main import main
from personalize.cli.redrawing import redrawn
from personalize.errors import UserError
from personalize.io.provenance import Provenance, picture_bytes, read_marks
from tests.support.lora_states import random_adapter
from tests.support.tiny import tiny, tiny_folder

PROMPT = "a dog in the snow"


def load_file_metadata(path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


SECRETS = ("Jane Owner", "SERIAL-4711", "secret-place")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_folder("sd1", tmp_path_factory.mktemp("secret-place-base"))


@pytest.fixture
def adapter(tmp_path):
    return random_adapter(tiny("sd1")).save(tmp_path / "adapter")


@pytest.fixture
def photo(tmp_path):
    """A photo with place, owner and serial number in its EXIF data."""
    exif = Image.Exif()
    exif[0x013B] = SECRETS[0]
    exif.get_ifd(0x8769)[0xA431] = SECRETS[1]
    exif.get_ifd(0x8825)[1] = "N"
    (tmp_path / "secret-place").mkdir()
    path = tmp_path / "secret-place" / "photo.jpg"
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, exif=exif)
    return path


def run(base, out, *words) -> int:
    steps = ["--num_inference_steps", "2"] if words[0] != "train" else []
    return main([*map(str, words), "--pretrained_model_name_or_path", str(base), "--output_dir", str(out), *steps])


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_a_picture_chooses_no_place_and_no_network(base, adapter, tmp_path) -> None:
    """Its options are read as if they were typed: one that names a folder, a base or a network is not the picture's."""
    assert run(base, tmp_path / "out", "edit", adapter, "--prompt", PROMPT) == 0
    details = read_marks(tmp_path / "out" / "edit-000.png").details
    details["options"] |= {
        "output_dir": "/elsewhere", "pretrained_model_name_or_path": "owner/name", "allow_download": True,
        "clip_model": "owner/name", "identity_model": "owner/name", "c2pa": ["a", "b"], "guidance_scale": 3.0,
    }  # fmt: skip
    hostile = tmp_path / "hostile.png"
    hostile.write_bytes(picture_bytes(Image.new("RGB", (8, 8)), Provenance("trainedAlgorithmicMedia", details)))
    _, _, options = redrawn([str(adapter)], hostile)
    places = {"output_dir", "pretrained_model_name_or_path", "allow_download", "clip_model", "identity_model", "c2pa"}
    assert options["guidance_scale"] == 3.0 and options["prompt"] == PROMPT and not places & set(options)


def test_an_edit_is_drawn_again_from_its_picture(base, adapter, tmp_path, monkeypatch, capsys):
    """The second of two seeds and of two strengths, alone, to the byte; the adapter is found by its hash."""
    assert run(base, tmp_path / "out", "edit", adapter, "--prompt", PROMPT, "--seeds", 3, 4, "--alpha", 0.8, 1.0) == 0
    picture = tmp_path / "out" / "edit-003.png"
    marks = read_marks(picture)
    assert marks.source_type.endswith("/trainedAlgorithmicMedia") and "Seed: 4" in marks.parameters
    twin = load_file_metadata(adapter / "adapter.safetensors")["sshs_model_hash"].removeprefix("0x")
    assert f'Lora hashes: "adapter: {twin[:12]}"' in marks.parameters, "as A1111 hashes the file that it loads"
    assert read_marks(tmp_path / "out" / "grid.png").source_type == marks.source_type
    monkeypatch.chdir(tmp_path)
    shutil.copy(picture, tmp_path / "copied.png")
    assert (
        main(["edit", "--from", "copied.png", "--output_dir", "again", "--pretrained_model_name_or_path", str(base)])
        == 0
    )
    again = tmp_path / "again" / "edit-000.png"
    assert read_marks(again).details == marks.details and np.array_equal(*map(pixels, (again, picture)))
    assert again.read_bytes() == picture.read_bytes()
    assert run(base, "other", "edit", adapter, "--from", picture, "--seed", 3) == 0, "options take the place of its own"
    alone, beside = (pixels(path).astype(int) for path in ("other/edit-000.png", "out/edit-002.png"))
    assert abs(alone - beside).max() <= 1, "alone and beside another seed, products are rounded differently"
    capsys.readouterr()
    assert main(["inspect", "copied.png"]) == 0
    said = capsys.readouterr().out
    assert "made by a model" in said and PROMPT in said and "--from copied.png" in said
    assert main(["inspect", "copied.png", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["details"]["seed"] == 4


def test_what_is_given_takes_the_place_of_what_excludes_it(base, adapter, tmp_path):
    """A picture of one seed, which was recorded twice; alpha and beta give way to gamma; the adapter stands last."""
    assert run(base, tmp_path / "out", "edit", adapter, "--prompt", PROMPT, "--seed", 5) == 0
    picture = tmp_path / "out" / "edit-000.png"
    assert run(base, tmp_path / "again", "edit", "--alpha", 0.8, adapter, "--from", picture) == 0
    assert (tmp_path / "again" / "edit-000.png").read_bytes() == picture.read_bytes()
    for words in (["--gamma", 0.7], ["--num_images", 2], ["--beta", 1.0, 1.4]):
        assert run(base, tmp_path / "more", "edit", adapter, "--from", picture, *words) == 0


@pytest.mark.parametrize(
    "change", [{"adapters": []}, {"base": {"name": "x"}}, {"options": []}, {"files": {"a": {}}}, {"seed": "x"}]
)
def test_damaged_details_are_one_line(base, adapter, change, tmp_path, capsys):
    assert run(base, tmp_path / "out", "edit", adapter, "--prompt", PROMPT) == 0
    marks = read_marks(tmp_path / "out" / "edit-000.png")
    picture = tmp_path / "damaged.png"
    picture.write_bytes(picture_bytes(Image.new("RGB", (32, 32)), Provenance(details={**marks.details, **change})))
    capsys.readouterr()
    assert run(base, tmp_path / "no", "edit", "--from", picture) == 2
    assert "damaged" in capsys.readouterr().err and not (tmp_path / "no").exists()


def test_another_adapter_or_base_or_picture_is_refused(base, adapter, tmp_path, capsys):
    assert run(base, tmp_path / "out", "edit", adapter, "--prompt", PROMPT) == 0
    picture = tmp_path / "out" / "edit-000.png"
    other = random_adapter(tiny("sd1"), seed=5).save(tmp_path / "far" / "away" / "other")
    for words, message in (
        ((base, other, "--from", picture), r"drawn with the adapter adapter \(\w{10}\), got other"),
        ((base, adapter, "--add", other, "--from", picture), "drawn with 1 adapters, 2 are given"),
        ((base, adapter, "--from", tmp_path / "out" / "grid.png"), "does not say how it was drawn"),
        ((base, adapter, "--from", tmp_path / "nothing.png"), "nothing.png"),
    ):
        assert run(words[0], tmp_path / "refused", "edit", *words[1:]) == 2
        assert re.search(message, capsys.readouterr().err) and not (tmp_path / "refused").exists()


def test_an_edit_of_a_photo_is_made_again_from_its_picture(base, photo, tmp_path, capsys):
    (tmp_path / "cat").mkdir()  # a folder called like a word of the prompt is none of its places
    words = ("edit", photo, "--source", "a cat on grass", "--swap", "cat=dog", "--mask", "0,0,48,64")
    assert run(base, tmp_path / "out", *words) == 0
    picture = tmp_path / "out" / "edited.png"
    assert read_marks(picture).source_type.endswith("/compositeWithTrainedAlgorithmicMedia")
    assert run(base, tmp_path / "again", "edit", photo, "--from", picture) == 0
    assert (tmp_path / "again" / "edited.png").read_bytes() == picture.read_bytes()
    Image.new("RGB", (96, 64)).save(tmp_path / "other.png")
    assert run(base, tmp_path / "no", "edit", tmp_path / "other.png", "--from", picture) == 2
    assert "drawn with the file photo.jpg" in capsys.readouterr().err
    assert run(base, tmp_path / "no", "edit", "--from", picture) == 2
    assert "an edit of the photo 'photo.jpg'" in capsys.readouterr().err


def test_what_is_left_out(base, adapter, tmp_path, capsys):
    def marks(*words):
        assert run(base, tmp_path / "out", "edit", adapter, "--prompt", PROMPT, *words) == 0
        picture = sorted((tmp_path / "out").glob("edit-*.png"))[-1]
        assert (PROMPT.encode() in picture.read_bytes()) == ("--no_metadata" not in words)
        return read_marks(picture)

    assert marks("--no_metadata").source_type is not None and "--no_provenance:" not in capsys.readouterr().out
    assert not marks("--no_metadata", "--no_provenance") and "article 50" in capsys.readouterr().out
    assert marks("--no_provenance").source_type is None


def strings_in(folder) -> dict[str, set[str]]:
    """Which of SECRETS each file holds, as UTF-8 or UTF-16."""
    found = {}
    for path in (path for path in folder.rglob("*") if path.is_file()):
        content = path.read_bytes()
        held = {
            text for text in SECRETS for code in ("utf-8", "utf-16-le", "utf-16-be") if text.encode(code) in content
        }
        if held:
            found[str(path.relative_to(folder))] = held
    return found


def test_nothing_personal_goes_into_any_file(base, photo, tmp_path):
    """A photo with place, owner and serial number: trained on, edited with a mask file, dragged; paths neither."""
    mask = photo.parent / "mask.png"
    Image.fromarray(np.pad(np.full((24, 24), 255, np.uint8), ((20, 20), (10, 62)))).save(mask)
    adapter = tmp_path / "adapter"
    learn = ["--caption", "a cat", "--max_train_samples", "1", "--train_batch_size", "1", "--preview_steps", "1"]
    assert run(base, adapter, "train", "single_image", photo, *learn) == 0
    assert run(base, tmp_path / "edits", "edit", adapter, "--prompt", PROMPT) == 0
    words = ("edit", photo, "--source", "a cat on grass", "--swap", "cat=dog")
    assert run(base, tmp_path / "photo", *words, "--mask", mask) == 0
    assert run(base, tmp_path / "drag", "drag", photo, "--from", "20,30", "--to", "40,30", "--mask", mask) == 0
    shutil.rmtree(photo.parent)
    assert strings_in(tmp_path) == {}
    marked = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png") if read_marks(path).source_type}
    drawn = {"adapter/reconstruction.png", "edits/edit-000.png", "edits/grid.png", "photo/edited.png"}
    assert marked == drawn | {"photo/before-after.png", "drag/dragged.png"}, "what a model made, and nothing else"


def test_exif_is_kept_where_it_is_asked_for(base, photo, tmp_path):
    words = ("edit", photo, "--source", "a cat on grass", "--swap", "cat=dog", "--keep_exif")
    assert run(base, tmp_path / "out", *words) == 0
    assert Image.open(tmp_path / "out" / "edited.png").getexif()[0x013B] == SECRETS[0]


def certificate(folder):
    """A certificate chain of an authority of our own, and the private key, as PEM files."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    def name(text):
        return x509.Name(
            [x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Test"), x509.NameAttribute(NameOID.COMMON_NAME, text)]
        )

    root, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    now = datetime.now(UTC)

    def built(subject, public, *, authority: bool):
        usage = dict.fromkeys(
            ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only",
             "decipher_only"), False,
        )  # fmt: skip
        builder = (
            x509.CertificateBuilder().subject_name(name(subject)).issuer_name(name("Root")).public_key(public)
            .serial_number(x509.random_serial_number()).not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=30))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
            .add_extension(x509.KeyUsage(digital_signature=not authority, key_cert_sign=authority, crl_sign=authority,
                                         **usage), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(root.public_key()), critical=False)
        )  # fmt: skip
        if not authority:
            builder = builder.add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), critical=False
            )
        return builder.sign(root, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    chain = built("Signer", key.public_key(), authority=False) + built("Root", root.public_key(), authority=True)
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (folder / "chain.pem").write_bytes(chain)
    (folder / "key.pem").write_bytes(secret)
    return folder / "chain.pem", folder / "key.pem"


@pytest.mark.skipif(find_spec("c2pa") is None, reason="c2pa-python is not installed")
def test_a_picture_is_signed_and_keeps_its_marks(base, adapter, tmp_path, capsys):
    import c2pa

    chain, key = certificate(tmp_path)
    assert run(base, tmp_path / "out", "edit", adapter, "--prompt", PROMPT, "--c2pa", chain, key) == 0
    picture = tmp_path / "out" / "edit-000.png"
    with c2pa.Reader("image/png", picture.open("rb")) as reader:
        report = json.loads(reader.json())
    text = json.dumps(report["manifests"][report["active_manifest"]])
    assert "c2pa.created" in text and "trainedAlgorithmicMedia" in text
    failures = {status["code"] for status in report.get("validation_status", [])}
    assert failures <= {"signingCredential.untrusted"}, "the authority is ours, on nobody's list"
    assert read_marks(picture).details["prompt"] == PROMPT
    assert run(base, tmp_path / "no", "edit", adapter, "--prompt", PROMPT, "--c2pa", key, chain) == 2
    assert "holds no PEM block of a certificate" in capsys.readouterr().err
    assert run(base, tmp_path / "no", "edit", adapter, "--prompt", PROMPT, "--c2pa", key) == 2
    assert "takes two files" in capsys.readouterr().err
    assert run(base, tmp_path / "no", "edit", adapter, "--prompt", PROMPT, "--c2pa", tmp_path / "x", key) == 2
    assert "no such file" in capsys.readouterr().err and not (tmp_path / "no").exists()


@pytest.mark.skipif(find_spec("c2pa") is None, reason="c2pa-python is not installed")
def test_a_key_of_another_certificate_is_found_before_anything_is_drawn(tmp_path):
    """It was found when the first picture was to be written, and with it all pictures were lost."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    chain, key = certificate(tmp_path / "one")
    other = certificate(tmp_path / "two")[1]
    options = {"metadata": True, "provenance": True}
    assert PictureWriter(SimpleNamespace(**options, c2pa=(chain, key)))(Image.new("RGB", (8, 8)))
    with pytest.raises(UserError, match="the picture cannot be signed with"):
        PictureWriter(SimpleNamespace(**options, c2pa=(chain, other)))
