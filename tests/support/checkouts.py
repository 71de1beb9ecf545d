"""Checkouts of other people's programs, named by environment variables, for tests marked `peer`."""

import importlib
import os
import sys
from unittest.mock import MagicMock

import pytest


def checkout(variable, monkeypatch):
    """The path in an environment variable, put on the import path; skips without it."""
    path = os.environ.get(variable)
    if not path:
        pytest.skip(f"{variable} is not set to a checkout")
    if not os.path.isdir(path):
        pytest.skip(f"{variable} is {path}, which is no folder")
    monkeypatch.syspath_prepend(path)
    monkeypatch.setattr(sys, "argv", sys.argv[:1])


def load(name):
    """Import a module of a checkout, with stand-ins for packages that are not installed here."""
    for _ in range(20):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or error.name.split(".")[0] == name.split(".")[0]:
                raise
            sys.modules[error.name] = MagicMock()
    raise AssertionError(f"{name} imports too much that is not here")
