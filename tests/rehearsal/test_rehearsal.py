"""Every file of flows runs in a process of its own, in which the pretended device is there before torch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.rehearsal.build import obstacle

FOLDER = Path(__file__).parent
FLOWS = sorted(FOLDER.glob("flows_*.py"))
pytestmark = [pytest.mark.rehearsal, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module", autouse=True)
def compiler() -> None:
    if reason := obstacle():
        pytest.skip(reason)


@pytest.mark.parametrize("file", FLOWS, ids=lambda file: file.stem.removeprefix("flows_"))
def test_flows(file):
    done = run(file)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-5_000:]


def run(file: Path, *arguments: str) -> subprocess.CompletedProcess:
    """pytest on one file of flows, whose own settings leave out this folder's."""
    settings = ("addopts=", "python_files=flows_*.py", "python_functions=flow_*", "timeout=300")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.rehearsal.plugin", "-p", "no:cacheprovider"]
    command += [part for setting in settings for part in ("-o", setting)]
    device = {"REHEARSAL_DEVICE": "mps" if file.stem == "flows_mps" else "cuda"}
    root = FOLDER.parents[1]
    return subprocess.run(
        [*command, str(file), *arguments], cwd=root, env=os.environ | device, capture_output=True, text=True
    )
