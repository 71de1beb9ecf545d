"""`personalize doctor`: what it finds, what it calls a problem, and that it is light."""

import importlib.metadata as metadata
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from personalize.cli.commands import doctor
from personalize.cli.main import main

PACKAGES = ["torch>=2.6", "numpy>=1.26", "absent-one>=3", "other>=1; sys_platform == 'nowhere'"]
EXTRAS = [
    "tensorboard>=2 ; extra == 'tracking'",
    'absent-two[more]>=1 ; extra == "tracking"',
    "personalize[test] ; extra == 'dev'",
]


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine without GPU on which torch 2.5 and tensorboard are installed."""
    versions = {"torch": "2.5.1+cpu", "numpy": "2.0.0", "tensorboard": "2.18"}

    def version(name):
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(metadata, "requires", lambda name: PACKAGES + EXTRAS)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache" / "hub"))
    return versions


def test_packages_and_what_is_missing(machine):
    found = doctor.report()
    assert set(found["packages"]) == {"torch", "numpy", "absent-one"}  # none of another system
    assert found["packages"]["torch"] == {"version": "2.5.1+cpu", "wanted": ">=2.6"}
    assert found["extras"] == {"tracking": ["absent-two"]}
    assert [problem.split(":")[0] for problem in found["problems"]] == [
        "torch is 2.5.1+cpu, wanted >=2.6", "absent-one is missing",
    ]  # fmt: skip
    machine |= {"torch": "2.13.0.dev1", "absent-one": "3.0"}
    assert not doctor.report()["problems"]


def test_an_extra_whose_package_is_too_old_is_not_installed(machine):
    """The studio needs Gradio 6.7 and refuses older ones, of which this said that all was there."""
    machine["absent-two"] = "1"
    assert doctor.report()["extras"] == {"tracking": []} and "installed" in doctor.as_text(doctor.report())
    machine["tensorboard"] = "1.15"
    assert doctor.report()["extras"] == {"tracking": ["tensorboard>=2 (1.15 is there)"]}
    assert "without tensorboard>=2 (1.15 is there)" in doctor.as_text(doctor.report())


@pytest.mark.skipif(sys.platform == "win32", reason="a folder that takes no file is made otherwise there")
def test_folders(machine, monkeypatch, tmp_path):
    """A cache that does not exist yet is one that can be made; one below a file, or without rights, is a problem."""
    state = doctor.report()["folders"]["models"]
    assert state["problem"] is None and state["free"] > 0 and state["path"].endswith("hub")
    assert not (tmp_path / "cache").exists()  # looking makes nothing
    (tmp_path / "file").write_text("x")
    assert doctor.folder_state(tmp_path / "file" / "hub")["problem"] == "not a directory"
    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", lambda dir: (_ for _ in ()).throw(PermissionError(13, "No")))
    assert any("the folder for models" in problem for problem in doctor.report()["problems"])


@pytest.mark.parametrize(("build", "problem"), [("2.13.0+cpu", True), ("2.13.0+cu130", False), ("2.13.0", False)])
def test_gpus(machine, monkeypatch, build, problem):
    """Two GPUs as the driver tells them; a torch without CUDA beside them is a problem."""
    machine |= {"torch": build, "absent-one": "3"}
    told = "NVIDIA H100, 81559, 80000, 570.1\nNVIDIA T4, [N/A], 15000, 570.1\n"
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/bin/nvidia-smi")
    monkeypatch.setattr(doctor.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=told))
    found = doctor.report()
    assert [device["name"] for device in found["devices"]] == ["NVIDIA H100", "NVIDIA T4"]
    assert found["devices"][0]["memory"] == 81559 << 20 and found["devices"][1]["memory"] is None
    assert any("without CUDA" in text for text in found["problems"]) == problem


def test_a_driver_that_does_not_answer(machine, monkeypatch):
    def hang(*_, **__):
        raise subprocess.TimeoutExpired("nvidia-smi", 2)

    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/bin/nvidia-smi")
    monkeypatch.setattr(doctor.subprocess, "run", hang)
    assert doctor.report()["devices"][0]["name"] == "the driver does not answer"


def test_requirements_of_a_checkout_that_is_not_installed(monkeypatch):
    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", absent)
    lines = doctor.requirements()
    assert "torch>=2.6" in lines and any(line.endswith('extra == "test"') for line in lines)


def test_command(machine, capsys):
    assert main(["doctor", "--json"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["personalize"] and "2 problem(s)" in err and "pip install 'absent-one>=3'" in err
    machine |= {"torch": "2.13.0", "absent-one": "3"}
    assert main(["doctor"]) == 0
    assert "torch        2.13.0 (wanted >=2.6)" in capsys.readouterr().out


def test_no_heavy_library_is_imported():
    code = "import sys; from personalize.cli.main import main; main(['doctor']); "
    code += "assert not {'torch', 'numpy', 'diffusers', 'transformers', 'accelerate'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[3])
    assert done.returncode == 0, done.stderr
