"""Files of an adapter that are not, byte for byte, what was saved, and weights that no training leaves."""

from __future__ import annotations

import json
import random

import pytest

from personalize.adapters.adapter import Adapter
from personalize.cli.commands.verify import run
from personalize.cli.options import VerifyConfig
from personalize.editing.config import EditStrengths
from personalize.editing.stored_strengths import remember
from personalize.errors import UserError
from personalize.formats.adapter_folders import MANIFEST
from personalize.formats.integrity import changed_files
from personalize.formats.verification import verify_file, verify_folder
from personalize.io.figures import png
from personalize.io.tensor_files import read_tensors, tensor_bytes
from tests.formats.test_verification import DIFFUSERS_FILE, KOHYA, KOHYA_FILE, MODULE, make


@pytest.fixture
def folder(tmp_path):
    return make("sd1")[1].save(tmp_path / "mine")


def found(folder):
    """What `verify` says of a folder, a file that cannot be read included."""
    try:
        return [problem for file in verify_folder(folder).files for problem in file.problems]
    except UserError as error:
        return [str(error)]


def test_a_saved_folder_and_one_that_remembers_an_edit_are_what_was_saved(folder):
    assert changed_files(folder)[0] == []
    remember(folder, "a dog", EditStrengths(), 3, {})
    assert changed_files(folder)[0] == [] and not found(folder)
    again = Adapter.load(folder)
    assert not {"sha256", "manifest_sha256"} & set(again.info)


@pytest.mark.parametrize("number", range(40))
def test_every_bit_flip_of_every_file_shows(folder, number):
    draw = random.Random(number)
    files = sorted(path for path in folder.iterdir() if path.is_file())
    path = files[number % len(files)]
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)
    assert found(folder), f"{path.name} is changed"


@pytest.mark.parametrize("key", ["caption", "rank", "license", "sha256", "manifest_sha256"])
def test_a_changed_manifest_shows(folder, key):
    manifest = json.loads((folder / "adapter.json").read_text())
    values = {"caption": "another", "rank": 4, "license": "mine", "sha256": {}, "manifest_sha256": "0" * 64}
    if key == "rank":
        manifest["alpha"] = 2 * manifest["alpha"]
    (folder / "adapter.json").write_text(json.dumps(manifest | {key: values[key]}))
    assert found(folder)


EARLIER = f"note: {MANIFEST} records no hashes of the files (saved by an earlier version): only weights were compared"


def as_an_earlier_version_saved_it(folder):
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["sha256"], manifest["manifest_sha256"]
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


def test_a_folder_without_recorded_bytes_verifies_by_its_weights_with_a_note(folder, capsys):
    as_an_earlier_version_saved_it(folder)
    report = verify_folder(folder)
    assert report.ok and EARLIER in str(report) and report.files[0].total == 0
    assert run(VerifyConfig(folder)).ok
    assert EARLIER in capsys.readouterr().out


@pytest.mark.parametrize("file", [DIFFUSERS_FILE, KOHYA_FILE, "source_embedding.safetensors"])
def test_changed_weights_show_in_a_folder_without_recorded_bytes(folder, file):
    changed(as_an_earlier_version_saved_it(folder) / file, lambda tensors: next(iter(tensors.values())).add_(1))
    report = verify_folder(folder)
    assert not report.ok and any(part.file.startswith(file) for part in report.files if part.problems)


@pytest.mark.parametrize("hashes", [None, {}, [], "x", 3])
def test_hashes_that_were_taken_out_of_a_sealed_manifest_show(folder, hashes):
    manifest = json.loads((folder / MANIFEST).read_text()) | {"sha256": hashes}
    (folder / MANIFEST).write_text(json.dumps({k: v for k, v in manifest.items() if v is not None}))
    assert verify_folder(folder).files[0].problems


@pytest.mark.parametrize("hashes", [{}, [], "x", 3])
def test_hashes_that_no_version_wrote_show(folder, hashes):
    manifest = json.loads((as_an_earlier_version_saved_it(folder) / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"sha256": hashes}))
    assert verify_folder(folder).files[0].problems


def test_a_missing_file_is_named(folder):
    (folder / "README.md").unlink()
    assert found(folder) == ["README.md is missing"]


def test_bytes_come_first(folder):
    (folder / KOHYA_FILE).write_bytes(tensor_bytes(read_tensors(folder / KOHYA_FILE).tensors))
    report = verify_folder(folder)
    assert report.files[0].problems == (f"{KOHYA_FILE} is not what was saved",)
    assert str(report).startswith("adapter.json and what it lists: ")


def changed(path, change):
    content = read_tensors(path)
    change(content.tensors)
    path.write_bytes(tensor_bytes(content.tensors, content.metadata))


def test_the_hash_in_a_files_own_header_is_compared(folder, tmp_path):
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes((folder / KOHYA_FILE).read_bytes())
    assert verify_file(alone).ok
    changed(alone, lambda tensors: tensors[f"{KOHYA}.lora_up.weight"].mul_(2))
    problems = verify_file(alone).files[0].problems
    assert [problem.split(" is of")[0] for problem in problems] == [
        "the header's sshs_model_hash", "the header's modelspec.hash_sha256",
    ]  # fmt: skip


@pytest.mark.parametrize("value", [5e36, -5e36, float("nan"), float("inf"), 2e4])
@pytest.mark.parametrize("side", ["A", "B"])
def test_absurd_weights_are_named(folder, tmp_path, value, side):
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes((folder / DIFFUSERS_FILE).read_bytes())
    changed(alone, lambda tensors: tensors[f"{MODULE}.lora_{side}.weight"][0].fill_(value))
    problems = verify_file(alone).files[0].problems
    assert any(f"module {MODULE} has a weight of" in problem for problem in problems), problems


def test_a_product_that_no_training_leaves_is_named(folder, tmp_path):
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes((folder / DIFFUSERS_FILE).read_bytes())

    def change(tensors):
        for side in "AB":
            tensors[f"{MODULE}.lora_{side}.weight"].fill_(200.0)

    changed(alone, change)
    assert any("has a weight of 8.0e+04" in problem for problem in verify_file(alone).files[0].problems)


def test_pictures_are_among_the_files(tmp_path):
    from PIL import Image

    picture = Image.new("RGB", (8, 8), "orange")
    folder = make("sd1")[1].save(tmp_path / "mine", pictures={"source": picture})
    (folder / "source.png").write_bytes(png(Image.new("RGB", (8, 8), "red")))
    assert found(folder) == ["source.png is not what was saved"]
