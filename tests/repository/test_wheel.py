"""What is installed: the wheel carries everything and runs from anywhere; an editable install carries no copies."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT_FOLDERS = [room for room in ("train", "export", "configs") if (ROOT / room).is_dir()]


def run(*args: object, cwd: Path, path: Path | None = None) -> str:
    """Output of Python called with `args` in `cwd`, with `path` alone on its module path; its errors fail the test."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"PYTHONPATH": str(path)} if path else {}
    done = subprocess.run([sys.executable, *map(str, args)], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def build(kind: str, folder: Path) -> Path:
    """The wheel of this checkout, as `pip` has it built: `kind` is "wheel" or "editable"."""
    code = f"from hatchling import build; build.build_{kind}({str(folder)!r})"
    run("-c", code, cwd=ROOT)
    return next(folder.glob("personalize-*.whl"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("target")
    run("-m", "pip", "install", wheel, "--no-deps", "--no-index", "--quiet", "--target", target, cwd=target)
    return target


def tracked(room: str) -> set[str]:
    """Names of the files of `room` that belong to the project, relative to the checkout."""
    files = (path for path in (ROOT / room).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(ROOT).as_posix() for path in files}


def test_wheel_holds_the_package_and_the_launchable_folders_and_nothing_else(wheel: Path):
    names = set(zipfile.ZipFile(wheel).namelist())
    launched = {f"personalize/_launch/{name}" for folder in SCRIPT_FOLDERS for name in tracked(folder)}
    expected = tracked("personalize") | launched
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert "personalize/_launch/train/embedded_model.py" in names and "personalize/py.typed" in names


def test_wheel_carries_the_licences_and_the_command(wheel: Path):
    archive = zipfile.ZipFile(wheel)
    files = {name.partition(".dist-info/")[2]: name for name in archive.namelist()}
    assert {"licenses/LICENSE", "licenses/THIRD_PARTY_NOTICES.md"} <= set(files)
    assert "personalize = personalize.cli.main:main" in archive.read(files["entry_points.txt"]).decode()
    metadata = message_from_bytes(archive.read(files["METADATA"]))
    assert metadata["License-Expression"] == "Apache-2.0" and metadata["Requires-Python"] == ">=3.11"
    assert {"test", "dev", "tracking", "metrics"} <= set(metadata.get_all("Provides-Extra", []))


def test_installed_wheel_runs_from_an_empty_folder(installed: Path, tmp_path: Path):
    code = "import personalize as p; from personalize.embedded.scenes import random_scene, render; "
    code += "print(p.__file__, render(random_scene(1))[0].shape)"
    file, shape = run("-c", code, cwd=tmp_path, path=installed).split(" ", 1)
    assert Path(file).is_relative_to(installed) and shape == "(128, 128, 3)"
    names = run("-m", "personalize", "train", "--help", cwd=tmp_path, path=installed)
    assert all(path.stem in names for path in (ROOT / "train").glob("*.py"))
    ask = "from personalize.cli.launch import scripts_home; print(scripts_home())"
    home = run("-c", ask, cwd=tmp_path, path=installed)
    assert Path(home) == installed / "personalize" / "_launch"


def test_installed_wheel_holds_the_art_and_the_model(installed: Path):
    package, source = installed / "personalize" / "embedded", ROOT / "personalize" / "embedded"
    art = len(list((source / "sprites").rglob("*.webp")))
    assert art == 291 and len(list((package / "sprites").rglob("*.webp"))) == art
    model = package / "model"
    assert (model / "model_index.json").is_file() and len(list(model.rglob("*.safetensors"))) >= 3
    assert sum(path.stat().st_size for path in model.rglob("*")) <= 45e6
    assert (package / "scene_scorer.safetensors").is_file()


def test_editable_install_points_at_the_checkout_and_copies_nothing(tmp_path: Path):
    archive = zipfile.ZipFile(build("editable", tmp_path))
    files = [name for name in archive.namelist() if ".dist-info/" not in name]
    assert len(files) == 1 and files[0].endswith(".pth")
    assert Path(archive.read(files[0]).decode().strip()) == ROOT


def test_checkout_uses_its_own_folders():
    home = run("-c", "from personalize.cli.launch import scripts_home; print(scripts_home())", cwd=ROOT, path=ROOT)
    assert Path(home) == ROOT


@pytest.mark.parametrize(("name", "command"), [("quickstart", "personalize quickstart"), ("tests", "pytest")])
def test_readme_holds_the_two_lines_that_ci_runs(name: str, command: str):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = text.partition(f"\n<!-- ci:{name} -->\n")[2].partition(f"\n<!-- /ci:{name} -->\n")[0]
    lines = [line for line in block.splitlines() if line and not line.startswith("```")]
    assert len(lines) == 1 and lines[0].startswith("pip install ") and lines[0].endswith(f"&& {command}")
