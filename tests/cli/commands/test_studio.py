"""`personalize studio` without Gradio, and its options."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata

import pytest

from personalize.cli.main import main
from personalize.cli.options import StudioConfig
from personalize.errors import UserError


def without_gradio(monkeypatch, found=None):
    real = metadata.version

    def version(name):
        if name != "gradio":
            return real(name)
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(metadata, "version", version)


def test_without_gradio_it_says_what_to_install(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    without_gradio(monkeypatch)
    assert main(["studio"]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "pip install 'personalize[studio]'" in message


@pytest.mark.parametrize("found", ["3.50.2", "6.6.9", "5.49"])
def test_an_old_gradio_is_refused(monkeypatch, tmp_path, found):
    monkeypatch.chdir(tmp_path)
    without_gradio(monkeypatch, found)
    with pytest.raises(UserError, match=f"6.7 or newer, found {found}"):
        StudioConfig().check()


@pytest.mark.parametrize("found", ["6.7.0", "6.31.0", "7.0"])
def test_newer_ones_are_taken(monkeypatch, tmp_path, found):
    monkeypatch.chdir(tmp_path)
    without_gradio(monkeypatch, found)
    StudioConfig().check()


@pytest.mark.parametrize("auth", ["me", ":secret", "me:"])
def test_a_password_needs_a_user(monkeypatch, tmp_path, auth):
    monkeypatch.chdir(tmp_path)
    without_gradio(monkeypatch, "6.31")
    with pytest.raises(UserError, match="user:password"):
        StudioConfig(auth=auth).check()


def test_every_command_is_read_without_gradio():
    code = """
import sys
sys.modules["gradio"] = None  # an import of it fails
import importlib
import personalize
from personalize.cli.options import COMMANDS
for name, (config, target) in COMMANDS.items():
    if name != "studio":
        importlib.import_module(target.partition(":")[0])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
